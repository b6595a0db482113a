"""What the sampler knows of each row: parameters and the history that penalties and seeds need, as arrays over rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.sampling_params import SamplingParams
from shardwright.worker.candidates import Filters
from shardwright.worker.penalties import Ints, PenaltyTable

Bools = npt.NDArray[np.bool_]

_LEAST_TEMPERATURE = 1e-5  # lower ones would divide logits to infinity


class SamplingState:
    """Sampling parameters of the worker's rows. A row is set when a sequence takes it, and holds until the next does.

    Args:
        max_num_seqs: number of rows.
        vocab_size: number of logits of the model.
        device: where the logits are.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.temperature = np.zeros(max_num_seqs, np.float32)
        """0 is greedy."""
        self.top_k = np.full(max_num_seqs, vocab_size, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.has_seed = np.zeros(max_num_seqs, np.bool_)
        """Rows without one get it from the sampler when they first sample."""
        self.seed = np.zeros(max_num_seqs, np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        """Of prompt and output together."""
        self.num_output_tokens = np.zeros(max_num_seqs, np.int64)
        self.min_tokens = np.zeros(max_num_seqs, np.int64)
        self.wants_logprobs = np.zeros(max_num_seqs, np.bool_)
        self.num_logprobs = np.zeros(max_num_seqs, np.int64)
        self.has_bias = np.zeros(max_num_seqs, np.bool_)
        self.has_penalties = np.zeros(max_num_seqs, np.bool_)
        self.penalties = PenaltyTable(max_num_seqs, vocab_size)
        self.may_change = np.zeros(max_num_seqs, np.bool_)
        """Rows whose token need not be that with the largest logit as the model gives it."""
        self.bias: dict[int, tuple[Tensor, Tensor]] = {}
        """Token ids and what is added to their logits, for the rows with `has_bias`."""
        self.stop_token_ids: dict[int, Tensor] = {}
        """Tokens to suppress, for the rows with `min_tokens`."""

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        *,
        prompt_token_ids: npt.ArrayLike,
        output_token_ids: npt.ArrayLike,
        stop_token_ids: Sequence[int],
    ) -> None:
        """A sequence starts in a row, or resumes after preemption with the output tokens it already has.

        Args:
            row: the row it takes.
            params: its parameters.
            prompt_token_ids: one or more ids.
            output_token_ids: none if it starts.
            stop_token_ids: end-of-sequence and stop tokens, suppressed until `min_tokens` tokens exist.
        """
        prompt, output = np.asarray(prompt_token_ids, np.int64), np.asarray(output_token_ids, np.int64)
        self.temperature[row] = max(params.temperature, _LEAST_TEMPERATURE) if params.temperature else 0.0
        self.top_k[row] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.has_seed[row], self.seed[row] = params.seed is not None, params.seed or 0
        self.num_tokens[row], self.num_output_tokens[row] = len(prompt) + len(output), len(output)
        self.wants_logprobs[row], self.num_logprobs[row] = params.logprobs is not None, params.logprobs or 0
        self._set_bias(row, params)
        self._set_min_tokens(row, params.min_tokens, stop_token_ids)
        self._set_penalties(row, params, prompt, output)
        is_processed = self.has_bias[row] or self.has_penalties[row] or self.min_tokens[row] > 0
        self.may_change[row] = is_processed or self.temperature[row] > 0

    def append(self, rows: Ints, token_ids: Ints) -> None:
        """Write down one sampled token for each of the rows, which are distinct."""
        self.num_tokens[rows] += 1
        self.num_output_tokens[rows] += 1
        counted = self.has_penalties[rows]
        if counted.any():
            self.penalties.append(rows[counted], token_ids[counted])

    def needs_more_tokens(self, rows: Ints) -> Bools:
        """Whether the rows may not end yet, and have tokens that would end them."""
        return self.num_output_tokens[rows] < self.min_tokens[rows]

    def needs_processing(self, rows: Ints) -> Bools:
        """Whether the rows' logits are changed before temperature and filters."""
        return self.has_bias[rows] | self.has_penalties[rows] | self.needs_more_tokens(rows)

    def filters(self, rows: Ints) -> Filters:
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def _set_bias(self, row: int, params: SamplingParams) -> None:
        self.has_bias[row] = bool(params.logit_bias)
        self.bias.pop(row, None)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self.device)
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self.device)
            self.bias[row] = ids, values

    def _set_min_tokens(self, row: int, min_tokens: int, stop_token_ids: Sequence[int]) -> None:
        # An end-of-sequence id of the tokenizer may lie beyond the model's vocabulary.
        known = [token_id for token_id in stop_token_ids if token_id < self.vocab_size]
        self.min_tokens[row] = min_tokens if known else 0
        if self.min_tokens[row]:
            self.stop_token_ids[row] = torch.tensor(known, dtype=torch.int64, device=self.device)
        else:
            self.stop_token_ids.pop(row, None)

    def _set_penalties(self, row: int, params: SamplingParams, prompt: Ints, output: Ints) -> None:
        self.has_penalties[row] = params.has_penalties
        self.penalties.repetition[row] = params.repetition_penalty
        self.penalties.presence[row] = params.presence_penalty
        self.penalties.frequency[row] = params.frequency_penalty
        if params.has_penalties:
            self.penalties.set_row(row, prompt_token_ids=prompt, output_token_ids=output)

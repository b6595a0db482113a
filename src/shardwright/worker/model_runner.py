"""One rank: the model, its KV cache, and the tables of the running sequences.

The tables mirror what the engine knows of each row, so that a step can be built with a few numpy operations whatever
the number of requests. The engine stays the owner: a row is filled anew whenever its sequence starts or resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.engine.messages import TokenLogprobs
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.sampler import Sampler, prompt_logprobs
from shardwright.worker.sampling_state import SamplingState
from shardwright.worker.step import Ints, StepModel, StepTables


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerLimits:
    """Sizes of the tables."""

    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    block_size: int


@dataclass(frozen=True, slots=True)
class _ScoredPrompt:
    """Prompt positions of one sequence whose next tokens are scored."""

    place: int
    """Of the sequence in the batch."""
    first: int
    """Position of the first of them."""
    packed_places: Ints


class ModelRunner:
    """Carries out batches.

    Args:
        model: with its cache allocated.
        limits: sizes of the tables.
        device: where logits are.
        seed: of sampling for requests that bring none.
        groups: per cache group that batches name, the place of the model's own; None: it has no layer of that group.
            Default: they are the same.
        samples: whether this rank turns logits into tokens; the others learn them from the batches that follow.
    """

    def __init__(
        self,
        model: StepModel,
        limits: RunnerLimits,
        *,
        device: torch.device,
        seed: int,
        groups: Sequence[int | None] | None = None,
        samples: bool = True,
    ) -> None:
        self._model = model
        self._limits = limits
        self._device = device
        self._samples = samples
        self._group_places = range(len(model.groups)) if groups is None else groups
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self._token_rows = np.zeros((limits.max_num_seqs, limits.max_model_len), dtype=np.int32)
        self._num_known = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self._num_prompt_logprobs = np.full(limits.max_num_seqs, -1, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self._block_tables = [np.zeros((limits.max_num_seqs, max_blocks), dtype=np.int32) for _ in model.groups]
        self._sampling = SamplingState(limits.max_num_seqs, limits.vocab_size, device)
        self._sampler = Sampler(seed=seed)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult | None:
        """Run one step: forward, sample, remember the sampled tokens. None from ranks that do not sample."""
        self._take_in(batch)
        rows = np.array(batch.rows, dtype=np.int64)
        num_computed = np.array(batch.num_computed, dtype=np.int64)
        num_tokens = np.array(batch.num_tokens, dtype=np.int64)
        ends = np.cumsum(num_tokens)
        samples = np.flatnonzero(num_computed + num_tokens == self._num_known[rows])
        scored = self._scored_prompts(rows, num_computed, num_tokens, ends)
        wanted, place_of = np.unique(
            np.concatenate([ends[samples] - 1, *(s.packed_places for s in scored)]), return_inverse=True
        )
        logits = self._model.compute(
            StepTables(
                token_rows=self._token_rows,
                block_tables=self._block_tables,
                rows=rows,
                num_computed=num_computed,
                num_tokens=num_tokens,
                logits_rows=wanted,
            )
        )
        if not self._samples:
            return None
        if scored:  # else they are in the order of the samples already
            logits = logits[torch.from_numpy(place_of).to(self._device)]
        return self._result(batch, rows, samples, scored, logits)

    def _take_in(self, batch: Batch) -> None:
        """Write down what is new in the batch."""
        if not self._samples:
            for row in batch.spoiled_rows:
                self._scrub(row)
            if batch.sampled_rows:
                self._remember(np.array(batch.sampled_rows), np.array(batch.sampled_token_ids))
        self._model.release(batch.freed_rows)
        for new in batch.new_rows:
            tokens = np.array(new.token_ids, dtype=np.int32)
            self._token_rows[new.row, : len(tokens)] = tokens
            self._num_known[new.row] = len(tokens)
            self._num_prompt_tokens[new.row] = new.num_prompt_tokens
            wanted = new.sampling_params.prompt_logprobs
            self._num_prompt_logprobs[new.row] = -1 if wanted is None else wanted
            self._sampling.set_row(
                new.row,
                new.sampling_params,
                prompt_token_ids=tokens[: new.num_prompt_tokens],
                output_token_ids=tokens[new.num_prompt_tokens :],
                stop_token_ids=new.stop_token_ids,
            )
        for update in batch.table_updates:
            place = self._group_places[update.group]
            if place is None:  # layers of this group are on other stages
                continue
            table = self._block_tables[place]
            table[update.row, update.start : update.start + len(update.blocks)] = update.blocks

    def _scored_prompts(self, rows: Ints, num_computed: Ints, num_tokens: Ints, ends: Ints) -> list[_ScoredPrompt]:
        """What to score for the rows that want prompt log-probabilities."""
        scored = []
        for place in np.flatnonzero(self._num_prompt_logprobs[rows] >= 0).tolist():
            first = int(num_computed[place])
            count = min(int(num_tokens[place]), int(self._num_prompt_tokens[rows[place]]) - 1 - first)
            if count > 0:
                start = int(ends[place] - num_tokens[place])
                scored.append(_ScoredPrompt(place, first, np.arange(start, start + count)))
        return scored

    def _result(
        self, batch: Batch, rows: Ints, samples: Ints, scored: list[_ScoredPrompt], logits: Tensor
    ) -> StepResult:
        tokens: list[int | None] = [None] * len(batch.rows)
        logprobs: dict[int, TokenLogprobs] = {}
        errors: dict[int, str] = {}
        if len(samples):
            sampled_rows, sampled_logits = rows[samples], logits[: len(samples)]
            sampled = self._sampler(sampled_logits, self._sampling, sampled_rows)
            # Not-a-number wins every argmax, so it is enough to look at the chosen logits.
            chosen = torch.from_numpy(sampled.token_ids).to(self._device)[:, None]
            for i in sampled_logits.gather(1, chosen).isnan().flatten().nonzero().flatten().tolist():
                errors[int(samples[i])] = "the model's logits are not numbers (NaN)"
                self._scrub(int(sampled_rows[i]))
            for i, (place, token) in enumerate(zip(samples.tolist(), sampled.token_ids.tolist(), strict=True)):
                tokens[place] = token
                if (row_logprobs := sampled.logprobs[i]) is not None:
                    logprobs[place] = row_logprobs
            self._remember(sampled_rows, sampled.token_ids)
        prompt: dict[int, list[TokenLogprobs]] = {}
        start = len(samples)
        for part in scored:
            row, count = rows[part.place], len(part.packed_places)
            known = self._token_rows[row, part.first + 1 : part.first + 1 + count].astype(np.int64)
            prompt[part.place] = prompt_logprobs(
                logits[start : start + count],
                torch.from_numpy(known).to(self._device),
                int(self._num_prompt_logprobs[row]),
            )
            start += count
        return StepResult(token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompt, errors=errors)

    def _scrub(self, row: int) -> None:
        num_blocks = -(-int(self._num_known[row]) // self._limits.block_size)
        self._model.scrub([table[row, :num_blocks].astype(np.int64) for table in self._block_tables])

    def _remember(self, rows: Ints, token_ids: Ints) -> None:
        room = self._num_known[rows] < self._token_rows.shape[1]  # a last token at max_model_len ends its sequence
        self._token_rows[rows[room], self._num_known[rows[room]]] = token_ids[room]
        self._num_known[rows] += 1
        self._sampling.append(rows, token_ids)

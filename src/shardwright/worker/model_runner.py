"""One rank: the model, its KV cache, and the tables of the running sequences.

The tables mirror what the engine knows of each row, so that a step can be built with a few numpy operations whatever
the number of requests. The engine stays the owner: a row is filled anew whenever its sequence starts or resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from shardwright.engine.messages import TokenLogprobs
from shardwright.kernels.jit import native_library
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.draft import DraftModel
from shardwright.worker.sampler import Sampler, prompt_logprobs
from shardwright.worker.sampling_state import SamplingState
from shardwright.worker.step import Ints, StepModel, StepTables, Tables, ranges
from shardwright.worker.table_rows import TableRows
from shardwright.worker.verify import verify


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
        draft: makes what proposes tokens to this rank, of the tokens of its rows; None: nothing does.
        has_kernels: whether Triton's kernels run on the device; else torch's operators choose tokens.
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
        draft: Callable[[Tables], DraftModel] | None = None,
        has_kernels: bool = False,
    ) -> None:
        self._model = model
        self._limits = limits
        self._device = device
        self._samples = samples
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self._token_rows = np.zeros((limits.max_num_seqs, limits.max_model_len), dtype=np.int32)
        self._num_known = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self._num_computed = np.zeros(limits.max_num_seqs, dtype=np.int64)
        """Tokens of each row that its last step had computed in the end, proposed ones included."""
        self._num_prompt_logprobs = np.full(limits.max_num_seqs, -1, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self._block_tables = TableRows(
            len(model.groups), num_rows=limits.max_num_seqs, max_blocks=max_blocks, places=groups
        )
        self._sampling = SamplingState(limits.max_num_seqs, limits.vocab_size, device)
        self._sampler = Sampler(seed=seed, has_kernels=has_kernels)
        if samples and device.type == "cpu":
            native_library()  # compiled before somebody waits for a token
        self._draft = draft(self._token_rows) if draft is not None else None

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult | None:
        """Run one step: forward, sample, remember the sampled tokens. None from ranks that do not sample."""
        self._take_in(batch)
        rows = np.array(batch.rows, dtype=np.int64)
        num_computed = np.array(batch.num_computed, dtype=np.int64)
        num_tokens = np.array(batch.num_tokens, dtype=np.int64)
        num_proposed = self._write_proposals(batch, rows)
        self._num_computed[rows] = num_computed + num_tokens
        ends = np.cumsum(num_tokens)
        num_missing = num_computed + num_tokens - num_proposed - self._num_known[rows]
        samples = np.flatnonzero(num_missing == 0)
        wanted = ends[samples] - 1
        if batch.proposed:
            wanted = ranges(wanted - num_proposed[samples], num_proposed[samples] + 1)
        scored = self._scored_prompts(rows, num_computed, num_tokens, ends)
        if scored:  # else they are in the order of the samples already
            wanted, place_of = np.unique(
                np.concatenate([wanted, *(s.packed_places for s in scored)]), return_inverse=True
            )
        logits = self._model.compute(
            StepTables(
                token_rows=self._token_rows,
                block_tables=self._block_tables.tables,
                rows=rows,
                num_computed=num_computed,
                num_tokens=num_tokens,
                logits_rows=wanted,
            )
        )
        for row in rows[num_missing > 0].tolist():  # planned before it was known that the step before gave it no token
            self._scrub(row)
        if not self._samples:
            return None
        if scored:
            logits = logits[torch.from_numpy(place_of).to(self._device)]
        return self._result(batch, rows, samples, scored, logits)

    def _take_in(self, batch: Batch) -> None:
        """Write down what is new in the batch."""
        if not self._samples:
            for row in batch.spoiled_rows:
                self._scrub(row)
            if batch.sampled_rows:
                self._remember_all(np.array(batch.sampled_rows), np.array(batch.sampled_token_ids))
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
        self._block_tables.take_in(batch.table_updates)
        if self._draft is not None:
            self._draft.take_in(batch)

    def _write_proposals(self, batch: Batch, rows: Ints) -> Ints:
        """Write proposed tokens behind those known. Returns: [S]: how many there are."""
        num_proposed = np.zeros(len(rows), dtype=np.int64)
        for place, tokens in batch.proposed.items():
            start = int(self._num_known[rows[place]])
            self._token_rows[rows[place], start : start + len(tokens)] = tokens
            num_proposed[place] = len(tokens)
        return num_proposed

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
        start = len(samples) + sum(map(len, batch.proposed.values()))
        sampled = self._sample(batch, rows, samples, logits[:start])
        if not scored:
            return sampled
        prompt: dict[int, list[TokenLogprobs]] = {}
        for part in scored:
            row, count = rows[part.place], len(part.packed_places)
            known = self._token_rows[row, part.first + 1 : part.first + 1 + count].astype(np.int64)
            prompt[part.place] = prompt_logprobs(
                logits[start : start + count],
                torch.from_numpy(known).to(self._device),
                int(self._num_prompt_logprobs[row]),
            )
            start += count
        return msgspec.structs.replace(sampled, prompt_logprobs=prompt)

    def _sample(self, batch: Batch, rows: Ints, samples: Ints, logits: Tensor) -> StepResult:
        """Give the rows of `samples` their tokens, and let the draft model propose the next ones."""
        tokens: list[int | None] = [None] * len(batch.rows)
        if not len(samples):
            return StepResult(token_ids=tokens, logprobs={}, prompt_logprobs={})
        places = samples.tolist()
        got = verify(
            logits,
            rows[samples],
            {i: batch.proposed[place] for i, place in enumerate(places) if place in batch.proposed},
            sampler=self._sampler,
            state=self._sampling,
            take=self._remember,
        )
        for place, token in zip(places, got.token_ids.tolist(), strict=True):
            tokens[place] = token
        errors = {places[i]: "the model's logits are not numbers (NaN)" for i in got.failed}
        for place in errors:
            self._scrub(int(rows[place]))
            if place in batch.proposed:
                tokens[place] = None
        return StepResult(
            token_ids=tokens,
            logprobs={places[i]: own for i, own in got.logprobs.items()},
            prompt_logprobs={},
            errors=errors,
            num_accepted={places[i]: count for i, count in got.num_accepted.items()},
            proposals=self._propose({p: n for p, n in batch.num_to_propose.items() if p not in errors}, rows),
        )

    def _propose(self, counts: dict[int, int], rows: Ints) -> dict[int, list[int]]:
        """What the draft model takes to follow next, by place; as many tokens for each as `counts` says."""
        if self._draft is None or not counts:
            return {}
        wanted = rows[list(counts)]
        proposals = self._draft.propose(
            wanted, np.array(list(counts.values())), self._num_known[wanted], self._sampler, self._sampling
        )
        return dict(zip(counts, proposals, strict=True))

    def _scrub(self, row: int) -> None:
        num_blocks = -(-int(self._num_computed[row]) // self._limits.block_size)
        self._model.scrub(self._block_tables.blocks(row, num_blocks))

    def _remember_all(self, rows: Ints, token_ids: Ints) -> None:
        """Write down tokens, in order; a row may stand there several times."""
        while len(rows):
            _, first = np.unique(rows, return_index=True)
            self._remember(rows[first], token_ids[first])
            rows, token_ids = np.delete(rows, first), np.delete(token_ids, first)

    def _remember(self, rows: Ints, token_ids: Ints) -> None:
        known = self._num_known[rows]
        has_room = known < self._token_rows.shape[1]  # a last token at max_model_len ends its sequence
        self._token_rows[rows[has_room], known[has_room]] = token_ids[has_room]
        self._num_known[rows] = known + 1
        self._sampling.append(rows, token_ids)

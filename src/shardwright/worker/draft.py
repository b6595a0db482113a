"""A smaller model that proposes tokens, step by step, for the served one to verify together.

It is held whole by the rank that samples. Its layers are cached in the blocks of the served model's layers (as those of
one more pipeline stage would be), so prefixes, preemption and windows know nothing of it. It computes a sequence up to
its end when it is first asked for proposals, and from then on what came since; what it has not computed in a block that
it shares, it makes up for. A block that was missed would cost proposals, never a wrong token: the served model decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shardwright.cache.spec import NULL_BLOCK
from shardwright.worker.batch import Batch
from shardwright.worker.sampler import Sampler
from shardwright.worker.sampling_state import SamplingState
from shardwright.worker.step import Ints, StepModel, StepTables, Tables
from shardwright.worker.table_rows import TableRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A model that proposes, before it has a cache."""

    model: StepModel
    max_model_len: int
    """Most tokens of a sequence that it reads."""


class DraftModel:
    """Proposes tokens for the rows of a rank.

    Args:
        draft: its model has its cache.
        token_rows: [max rows, max_model_len]: all tokens known of each row. Proposals are written behind these.
        num_blocks: of the cache, the null block not counted.
        block_size: tokens per block.
        most_tokens: of one of its steps.
        groups: as of TableRows.
    """

    def __init__(
        self,
        draft: Draft,
        token_rows: Tables,
        *,
        num_blocks: int,
        block_size: int,
        most_tokens: int,
        groups: Sequence[int | None] | None = None,
    ) -> None:
        model = self._model = draft.model
        num_rows, max_model_len = token_rows.shape
        self._token_rows = token_rows
        self._max_model_len = min(draft.max_model_len, max_model_len)
        self._block_size = block_size
        self._most_tokens = min(most_tokens, model.max_step_tokens or most_tokens)
        self._tables = TableRows(
            len(model.groups), num_rows=num_rows, max_blocks=-(-max_model_len // block_size), places=groups
        )
        self._num_seen = np.zeros(num_rows, dtype=np.int64)
        """Tokens of each row that it has computed."""
        self._num_tried = np.zeros(num_rows, dtype=np.int64)
        """Its own proposals that it has computed behind these, to propose more."""
        self._tried = np.zeros_like(token_rows)
        """These proposals, at their positions."""
        self._is_seen = np.zeros(num_blocks + 1, dtype=np.bool_)
        """Blocks that are whole, and of whose tokens it has computed every one."""

    def take_in(self, batch: Batch) -> None:
        """Write down what is new in the batch."""
        starts = dict(zip(batch.rows, batch.num_computed, strict=True))
        num_shared = {new.row: starts[new.row] // self._block_size for new in batch.new_rows}
        self._tables.take_in(batch.table_updates)
        for update in batch.table_updates:
            own = update.blocks[max(0, num_shared.get(update.row, 0) - update.start) :]
            self._is_seen[own] = False
        for row, count in num_shared.items():
            self._num_tried[row] = 0
            num_blocks = min((self._num_whole(blocks) for blocks in self._tables.blocks(row, count)), default=count)
            self._num_seen[row] = min(num_blocks * self._block_size, starts[row])

    def propose(
        self, rows: Ints, counts: Ints, num_known: Ints, sampler: Sampler, state: SamplingState
    ) -> list[list[int]]:
        """Propose what follows in some rows.

        Args:
            rows: [n], distinct.
            counts: [n]: how many tokens to propose for each; there are blocks for these.
            num_known: [n]: tokens of each.
            sampler, state: choose as if the tokens were the served model's.

        Returns: [n]: so many tokens, or fewer where the model reads no longer sequences.
        """
        proposals: list[list[int]] = [[] for _ in rows]
        counts = np.minimum(counts, self._max_model_len - num_known)
        going = np.flatnonzero(counts > 0)
        ahead = 0
        while len(going):
            here, known = rows[going], num_known[going]
            if ahead == 0:
                self._keep_what_came_true(here, known)
                self._catch_up(here, known)
                logits = self._compute(here, self._num_seen[here], known - self._num_seen[here], sampled=True)
                self._mark_seen(here, known)
            else:
                logits = self._compute(here, known + ahead - 1, np.ones_like(known), sampled=True)
                self._num_tried[here] = ahead
            choice = sampler.choose(logits, state, here, ahead=ahead)
            chosen, is_number = choice.token_ids, ~choice.is_nan
            self._scrub(here[~is_number])
            for place, token in zip(going[is_number].tolist(), chosen[is_number].tolist(), strict=True):
                proposals[place].append(token)
            self._token_rows[here[is_number], (known + ahead)[is_number]] = chosen[is_number]
            self._tried[here, known + ahead] = chosen
            ahead += 1
            going = going[is_number & (counts[going] > ahead)]
        return proposals

    def _num_whole(self, blocks: Ints) -> int:
        """How many of the first blocks of a table it has computed."""
        unseen = np.flatnonzero(~self._is_seen[blocks] & (blocks != NULL_BLOCK))
        return int(unseen[0]) if len(unseen) else len(blocks)

    def _keep_what_came_true(self, rows: Ints, num_known: Ints) -> None:
        """Count its own proposals that have become tokens as computed; the last token is always computed anew."""
        for row, known in zip(rows.tolist(), num_known.tolist(), strict=True):
            start = int(self._num_seen[row])
            end = min(start + int(self._num_tried[row]), known - 1)
            differs = np.flatnonzero(self._tried[row, start:end] != self._token_rows[row, start:end])
            self._num_seen[row] = start + int(differs[0]) if len(differs) else end
            self._num_tried[row] = 0

    def _catch_up(self, rows: Ints, num_known: Ints) -> None:
        """Compute what is missing before the last token, in steps that are small enough, until one step will do."""
        while True:
            missing = num_known - 1 - self._num_seen[rows]
            if missing.sum() + len(rows) <= self._most_tokens:
                return
            before = np.cumsum(missing) - missing
            pieces = np.clip(self._most_tokens - before, 0, missing)
            part = pieces > 0
            self._compute(rows[part], self._num_seen[rows[part]], pieces[part], sampled=False)
            self._num_seen[rows] += pieces

    def _compute(self, rows: Ints, num_computed: Ints, num_tokens: Ints, *, sampled: bool) -> Tensor:
        """Run a step. Returns: logits [n, vocab] after the last token of each row, if they are to be sampled from."""
        ends = np.cumsum(num_tokens)
        return self._model.compute(
            StepTables(
                token_rows=self._token_rows,
                block_tables=self._tables.tables,
                rows=rows,
                num_computed=num_computed,
                num_tokens=num_tokens,
                logits_rows=ends - 1 if sampled else ends[:0],
            )
        )

    def _mark_seen(self, rows: Ints, num_known: Ints) -> None:
        """All known tokens of the rows are computed."""
        self._num_seen[rows] = num_known
        for row, count in zip(rows.tolist(), (num_known // self._block_size).tolist(), strict=True):
            for blocks in self._tables.blocks(row, count):
                self._is_seen[blocks] = True

    def _scrub(self, rows: Ints) -> None:
        for row in rows.tolist():
            num_blocks = -(-int(self._num_seen[row] + self._num_tried[row]) // self._block_size)
            self._model.scrub(self._tables.blocks(row, num_blocks))

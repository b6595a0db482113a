"""A batch in the making: who computes how many tokens, and what workers have to be told for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from shardwright.engine.in_flight import ScheduledTokens
from shardwright.engine.request import Request
from shardwright.worker.batch import Batch, NewRow, TableUpdate

NOTHING: Mapping[int, list[int]] = MappingProxyType({})


class BatchBuilder:
    """Takes sequences within a budget of tokens.

    Args:
        budget: most tokens of the batch.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that may still be added."""
        self.may_start = True
        """Whether waiting requests may start; not where running ones lack blocks."""
        self._parts: dict[Request, ScheduledTokens] = {}
        self._new_rows: list[NewRow] = []
        self._updates: list[TableUpdate] = []
        self._num_to_propose: dict[Request, int] = {}

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self._parts)

    @property
    def parts(self) -> list[ScheduledTokens]:
        """Per sequence, in order, what it computes."""
        return list(self._parts.values())

    def add(self, request: Request, num_tokens: int, updates: list[TableUpdate]) -> None:
        """Let a sequence compute its next tokens.

        Args:
            request: a running one.
            num_tokens: at least one, within the budget.
            updates: of its block tables.
        """
        self._parts[request] = ScheduledTokens(request, request.num_computed_tokens, num_tokens)
        self._updates += updates
        self.budget -= num_tokens

    def extend(self, request: Request, proposed: list[int], updates: list[TableUpdate]) -> None:
        """Let a sequence compute tokens that are only proposed, behind its last one.

        Args:
            request: of the batch, with all the tokens that it has.
            proposed: within the budget.
            updates: of its block tables.
        """
        part = self._parts[request]
        part.num_tokens += len(proposed)
        part.proposed = proposed
        self._updates += updates
        self.budget -= len(proposed)

    def let_propose(self, request: Request, num_tokens: int, updates: list[TableUpdate]) -> None:
        """Let the draft model propose tokens for a sequence of the batch, once it has got its next ones.

        Args:
            request: of the batch.
            num_tokens: at least one.
            updates: of its block tables, which cover these too.
        """
        self._num_to_propose[request] = num_tokens
        self._updates += updates

    def announce(self, request: Request) -> None:
        """Tell workers of a sequence that starts or resumes."""
        self._new_rows.append(
            NewRow(
                row=request.held_row,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                sampling_params=request.params,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def drop(self, request: Request) -> None:
        """Take back what was planned for a sequence that is preempted in the same step; it still has its row."""
        part = self._parts.pop(request, None)
        if part is not None:
            self.budget += part.num_tokens
            self._updates = [update for update in self._updates if update.row != request.row]

    def build(
        self,
        *,
        freed_rows: Sequence[int] = (),
        sampled: Mapping[int, list[int]] = NOTHING,
        spoiled_rows: Sequence[int] = (),
    ) -> Batch:
        """The batch.

        Args:
            freed_rows: rows that came free since the last batch.
            sampled: tokens by row that came in since the last batch.
            spoiled_rows: rows of sequences that ended since the last batch, because their logits were not numbers.
        """
        parts = self._parts.values()
        return Batch(
            rows=[part.request.held_row for part in parts],
            num_computed=[part.start for part in parts],
            num_tokens=[part.num_tokens for part in parts],
            new_rows=self._new_rows,
            table_updates=self._updates,
            freed_rows=list(freed_rows),
            sampled_rows=[row for row, tokens in sampled.items() for _ in tokens],
            sampled_token_ids=[token for tokens in sampled.values() for token in tokens],
            spoiled_rows=list(spoiled_rows),
            proposed={place: list(part.proposed) for place, part in enumerate(parts) if part.proposed},
            num_to_propose={
                place: self._num_to_propose[part.request]
                for place, part in enumerate(parts)
                if part.request in self._num_to_propose
            },
        )

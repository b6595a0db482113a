"""Batches that the executor has and whose results are not in yet.

An executor carries out batches in the order in which it gets them, at every rank: what an earlier batch writes into the
cache is there for a later one. So the next piece of a prompt may follow before the result of the last is in. A sequence
that samples has no tokens left to compute until its result is in, and with that is in no other batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwright.engine.request import Request


@dataclass(slots=True)  # not frozen: that would take three times as long to make, for each sequence in each step
class ScheduledTokens:
    """The part of a batch that one sequence has: `num_tokens` tokens from position `start` on."""

    request: Request
    start: int
    num_tokens: int
    proposed: Sequence[int] = ()
    """The last of the tokens, which are not known to be the sequence's."""

    @property
    def end(self) -> int:
        """The position after the last of them."""
        return self.start + self.num_tokens

    @property
    def known_end(self) -> int:
        """The position after the last that is known."""
        return self.start + self.num_tokens - len(self.proposed)


class InFlight:
    """The batches in flight, oldest first. Keeps `Request.num_in_flight`."""

    def __init__(self) -> None:
        self._batches: deque[list[ScheduledTokens]] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[ScheduledTokens]:
        for batch in self._batches:
            yield from batch

    def push(self, batch: list[ScheduledTokens]) -> None:
        """The executor gets a batch, with at least one sequence in it."""
        self._batches.append(batch)
        for part in batch:
            part.request.num_in_flight += 1

    def pop_oldest(self) -> list[ScheduledTokens]:
        """The batch whose result comes next. Raises IndexError if there is none."""
        return self._landed(self._batches.popleft())

    def pop_newest(self) -> list[ScheduledTokens]:
        """The batch that was pushed last. Raises IndexError if there is none."""
        return self._landed(self._batches.pop())

    def clear(self) -> None:
        """No result will come any more."""
        while self._batches:
            self.pop_oldest()

    def _landed(self, batch: list[ScheduledTokens]) -> list[ScheduledTokens]:
        for part in batch:
            part.request.num_in_flight -= 1
        return batch

"""Batches that the executor has and whose results are not in yet.

An executor carries out batches in the order in which it gets them, at every rank: what an earlier batch writes into the
cache is there for a later one. So the next piece of a prompt may follow before the result of the last is in. A sequence
that samples has no tokens left to compute until its result is in, and with that is in no other batch. But where one
rank carries out everything, it knows the token when it comes to the next batch, which may be planned before (vLLM and
SGLang do so too). If that token ends the sequence, what the next batch computes for it is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwright.engine.request import Request
from shardwright.worker.batch import Batch


@dataclass(slots=True)  # not frozen: that would take three times as long to make, for each sequence in each step
class ScheduledTokens:
    """The part of a batch that one sequence has: `num_tokens` tokens from position `start` on."""

    request: Request
    start: int
    num_tokens: int
    proposed: Sequence[int] = ()
    """The last of the tokens, which are not known to be the sequence's."""
    is_awaited: bool = False
    """Whether the batch samples a token for the sequence that the next one may compute before it is known."""

    @property
    def end(self) -> int:
        """The position after the last of them."""
        return self.start + self.num_tokens

    @property
    def known_end(self) -> int:
        """The position after the last that is known."""
        return min(self.end - len(self.proposed), self.request.num_tokens)


@dataclass(frozen=True, slots=True)
class _Flight:
    batch: Batch
    parts: list[ScheduledTokens]


class InFlight:
    """The batches in flight, oldest first. Keeps `Request.num_in_flight` and `Request.num_awaited_tokens`."""

    def __init__(self) -> None:
        self._flights: deque[_Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[ScheduledTokens]:
        for flight in self._flights:
            yield from flight.parts

    def push(self, batch: Batch, parts: list[ScheduledTokens]) -> None:
        """The executor gets a batch, with at least one sequence in it, of which these are the parts."""
        self._flights.append(_Flight(batch, parts))
        for part in parts:
            part.request.num_in_flight += 1
            part.request.num_awaited_tokens += part.is_awaited

    def pop_oldest(self) -> list[ScheduledTokens]:
        """The parts of the batch whose result comes next. Raises IndexError if there is none."""
        flight = self._flights.popleft()
        self._land(flight)
        return flight.parts

    def pop_newest(self) -> tuple[Batch, list[ScheduledTokens]]:
        """The batch that was pushed last, and its parts. Raises IndexError if there is none."""
        flight = self._flights.pop()
        self._land(flight)
        return flight.batch, flight.parts

    def clear(self) -> None:
        """No result will come any more."""
        while self._flights:
            self.pop_oldest()

    def _land(self, flight: _Flight) -> None:
        for part in flight.parts:
            part.request.num_in_flight -= 1
            part.request.num_awaited_tokens -= part.is_awaited

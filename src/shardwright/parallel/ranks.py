"""A group of ranks that live and die together: what is asked of them, and what becomes of their troubles.

How messages get there and back is up to the kinds of groups: processes of this machine, actors of a Ray cluster.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TypeVar

from shardwright import errors
from shardwright.config import EngineConfig
from shardwright.errors import RanksLostError, ShardwrightError, UsageError
from shardwright.parallel.messages import (
    Allocate,
    Allocated,
    Command,
    Failed,
    Load,
    Loaded,
    Opened,
    Reply,
    Setup,
    Step,
    Stepped,
)
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.report import Allocation, WorkerReport

STEP_TIMEOUT_S = 600.0
"""A rank that has not finished a step by then hangs."""

POLL_S = 0.5

LAST_WORDS_S = 0.5
"""After the first sign of trouble, how long the others may take to say what the trouble is: the first is often a rank
that has lost its connection to the one that died."""

LAST_WORDS_AT_START_S = 3.0
"""The same at start, when it is more often something that the user can mend."""

R = TypeVar("R", Opened, Loaded, Allocated, Stepped)

Troubles = dict[int, Failed | None]
"""Ranks that cannot go on: what they said, None for those that ended without a word."""


class Ranks(ABC):
    """Started, but without a model. All of them end with the first that does.

    Args:
        num_ranks: how many there are.
        step_timeout_s: a rank that has not finished a step by then hangs.
    """

    def __init__(self, num_ranks: int, *, step_timeout_s: float) -> None:
        self._num_ranks = num_ranks
        self._step_timeout_s = step_timeout_s
        self._inbox: list[tuple[int, Reply]] = []
        self._port = 0
        self._is_serving = False
        self._lost: str | None = None
        """Why the ranks are gone."""

    @property
    def is_lost(self) -> bool:
        """Whether they are gone."""
        return self._lost is not None

    def set_up(self, setup: Setup) -> None:
        """Let the ranks find each other. Raises RanksLostError; a UsageError of a rank."""
        self._send(setup)
        self._port = self._wait(Opened, count=1)[0].port

    def load(self, config: EngineConfig) -> list[WorkerReport]:
        """Load a model, in place of the one before.

        Returns: the reports of all ranks, in order.
        Raises: a UsageError of a rank; RanksLostError.
        """
        self._is_serving = False
        self._send(Load(config=config, port=self._port))
        return [reply.report for reply in self._wait(Loaded, count=self._num_ranks)]

    def allocate(self, allocation: Allocation) -> None:
        """Make room on all ranks. Raises RanksLostError."""
        self._send(Allocate(allocation))
        self._wait(Allocated, count=self._num_ranks)
        self._is_serving = True

    def submit(self, batch: Batch) -> None:
        """Send a batch to all ranks. Raises RanksLostError."""
        self._send(Step(batch))

    def collect(self) -> StepResult:
        """The result of the oldest batch. Raises RanksLostError."""
        return self._wait(Stepped, count=1, timeout_s=self._step_timeout_s)[0].result

    @abstractmethod
    def close(self) -> None:
        """End all ranks and leave nothing behind. May be called twice."""

    @abstractmethod
    def _deliver(self, command: Command) -> bool:
        """Send a command to all ranks. Returns: False if one is gone."""

    @abstractmethod
    def _receive(self, timeout_s: float) -> Troubles:
        """Put what has arrived by then into the inbox. Returns: which ranks are in trouble."""

    @abstractmethod
    def _obituary(self, rank: int) -> str:
        """Why a rank is gone that said nothing."""

    def _send(self, command: Command) -> None:
        if self._lost is not None:
            raise RanksLostError(self._lost)
        self._lost = "a message to the ranks was cut short"  # if an interrupt comes, some have got it
        is_delivered = self._deliver(command)
        self._lost = None
        if not is_delivered:
            raise self._loss({})

    def _wait(self, kind: type[R], *, count: int, timeout_s: float | None = None) -> list[R]:
        """The next replies of a kind, by rank. Raises what made a rank fail, or RanksLostError."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            found = [(rank, reply) for rank, reply in self._inbox if isinstance(reply, kind)][:count]
            if len(found) == count:
                self._inbox = [item for item in self._inbox if not any(item[1] is reply for _, reply in found)]
                return [reply for _, reply in sorted(found, key=lambda item: item[0])]
            if self._lost is not None:
                raise RanksLostError(self._lost)
            if deadline is not None and time.monotonic() > deadline:
                raise self._loss({}, f"no rank has finished the step in {timeout_s:g} s: one of them hangs")
            if troubles := self._receive(POLL_S):
                raise self._loss(troubles)

    def _loss(self, troubles: Troubles, reason: str | None = None) -> ShardwrightError:
        """The error to raise for ranks in trouble. All ranks are ended."""
        deadline = time.monotonic() + (LAST_WORDS_S if self._is_serving else LAST_WORDS_AT_START_S)
        error = None if self._is_serving else bad_input(troubles)
        while reason is None and error is None and len(troubles) < self._num_ranks and time.monotonic() < deadline:
            troubles |= {rank: said for rank, said in self._receive(0.1).items() if rank not in troubles}
            error = None if self._is_serving else bad_input(troubles)
        if error is None:
            error = RanksLostError(reason or self._reason(troubles))
        self._lost = str(error)
        self.close()
        return error

    def _reason(self, troubles: Troubles) -> str:
        """Ranks that say something often only miss those that cannot."""
        if silent := [rank for rank, failed in troubles.items() if failed is None]:
            return "; ".join(self._obituary(rank) for rank in silent)
        said = next(((rank, failed.message) for rank, failed in troubles.items() if failed is not None), None)
        return "a rank's channel broke" if said is None else f"rank {said[0]} failed: {said[1]}"


def bad_input(troubles: Troubles) -> ShardwrightError | None:
    """The first error among what ranks said that is up to the user to mend."""
    for failed in troubles.values():
        kind = None if failed is None else getattr(errors, failed.kind, None)
        if failed is not None and isinstance(kind, type) and issubclass(kind, UsageError):
            return kind(failed.message)
    return None

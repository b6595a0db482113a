"""Ranks as threads of one process: collectives that meet in memory, and links between pipeline stages.

Sums are taken in the order of ranks, so every run gives the same bits, on every rank. A rank that fails, or returns
while others wait for it, ends their wait: nothing here can hang.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from shardwright.errors import PlanError

T = TypeVar("T")


class CollectiveMismatchError(PlanError):
    """Ranks that should make the same call make different ones, or one of them makes none."""


class _Unblocked(Exception):
    """Ends the wait for a rank that failed; never seen outside."""


class ThreadCollectives:
    """The collectives of one rank. See `shardwright.layers.collectives.Collectives`."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on every rank."""
        result: Tensor = self._meeting.meet(self.rank, ("all_reduce", tuple(tensor.shape)), tensor, _sum)
        return result.clone()

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Parts of the last dimension one after another, on every rank."""
        return self._gathered("all_gather", tensor, sizes).clone()

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Parts of the last dimension one after another, on rank 0; None elsewhere."""
        result = self._gathered("gather", tensor, sizes)
        return result.clone() if self.rank == 0 else None

    def _gathered(self, name: str, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        if tensor.shape[-1] != sizes[self.rank]:
            raise CollectiveMismatchError(
                f"rank {self.rank} has {tensor.shape[-1]} features to gather, but {sizes[self.rank]} are its part"
            )
        call = (name, tuple(tensor.shape[:-1]), tuple(sizes))
        result: Tensor = self._meeting.meet(self.rank, call, tensor, _join)
        return result


class MemoryLink:
    """Hands tensors from one pipeline stage to the next, first in, first out. Stages run one after another."""

    def __init__(self) -> None:
        self._sent: deque[list[Tensor]] = deque()

    def send(self, tensors: list[Tensor]) -> None:
        """Keep copies for the stage that comes next."""
        self._sent.append([tensor.clone() for tensor in tensors])

    def recv(self) -> list[Tensor]:
        """What the stage before sent. Raises PlanError if it sent nothing."""
        if not self._sent:
            raise PlanError("the stage before this one has handed over nothing")
        return self._sent.popleft()


def run_ranks(size: int, fn: Callable[[ThreadCollectives], T]) -> list[T]:
    """Call a function once for every rank, all of them at the same time.

    Args:
        size: number of ranks.
        fn: is given the collectives of its rank; runs with the caller's setting of gradients.

    Returns: what the calls returned, in the order of ranks.
    Raises: what the first of the ranks to fail raised; CollectiveMismatchError if ranks do not make the same calls.
    """
    meeting = _Meeting(size)
    gradients = torch.is_grad_enabled()
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(gradients):
                results[rank] = fn(ThreadCollectives(rank, meeting))
            meeting.leave(rank)
        except BaseException as exc:  # whatever it is, the others must not wait
            meeting.leave(rank, exc)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if meeting.failure is not None:
        raise meeting.failure
    return [results[rank] for rank in range(size)]


class _Meeting:
    """Where ranks wait for each other. A call is carried out by the rank that comes last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.failure: BaseException | None = None
        """What the first rank to fail raised."""
        self._condition = threading.Condition()
        self._waiting: dict[int, tuple[tuple[Any, ...], Tensor]] = {}
        self._gone: set[int] = set()
        self._round = 0
        self._result: Any = None

    def meet(
        self, rank: int, call: tuple[Any, ...], tensor: Tensor, combine: Callable[[list[Tensor]], Tensor]
    ) -> Tensor:
        """Wait until all ranks have made the same call. Returns what their tensors make together: to be copied."""
        with self._condition:
            if self.failure is not None:
                raise _Unblocked
            current = self._round
            self._waiting[rank] = call, tensor
            self._check()
            if len(self._waiting) == self.size:
                self._result = combine([self._waiting[r][1] for r in range(self.size)])
                self._waiting = {}
                self._round += 1
                self._condition.notify_all()
            while self._round == current and self.failure is None:
                self._condition.wait()
            if self._round == current:
                raise _Unblocked
            # The next round cannot end before this rank has joined it, so the result is still that of its own.
            return self._result  # type: ignore[no-any-return]

    def leave(self, rank: int, failure: BaseException | None = None) -> None:
        """A rank is done, or has failed: who waits for it is woken."""
        with self._condition:
            self._gone.add(rank)
            try:
                if failure is None and self.failure is None:
                    self._check()
            except CollectiveMismatchError as exc:
                failure = exc
            if self.failure is None and failure is not None and not isinstance(failure, _Unblocked):
                self.failure = failure
            self._condition.notify_all()

    def _check(self) -> None:
        """Raises CollectiveMismatchError if those who wait have not made the same call, or wait for one who is gone."""
        if not self._waiting:
            return
        (first, (call, _)), *others = sorted(self._waiting.items(), key=lambda item: item[0])
        for rank, (other, _) in others:
            if other != call:
                raise CollectiveMismatchError(
                    f"rank {first} calls {_described(call)} while rank {rank} calls {_described(other)}"
                )
        if self._gone:
            raise CollectiveMismatchError(
                f"rank {first} waits in {_described(call)} for rank {min(self._gone)}, which has returned"
            )


def _described(call: tuple[Any, ...]) -> str:
    return f"{call[0]} of {list(call[1])}"


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, dim=-1)

"""Threads of torch's operators."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NUMBERS = 1 << 18
"""Of an operation that all threads share: it takes one of them a tenth to a third of a millisecond."""
_REPEATS = 20
_ROUNDS = 8
"""Together some 40 ms: a busy system leaves a thread alone for a few."""
_CLEAR_S = 0.02
"""So much more than twice the time of one thread, and no more rounds are needed."""


@contextmanager
def threads_that_come() -> Iterator[None]:
    """While open, operators on the CPU use all their threads if these come at once, or else one.

    For passes of a few tokens at start, which are thousands of short operators: where other processes keep the cores
    busy, each would wait for its slowest thread (measured with three busy processes on two cores: 14 s instead of 8).
    Where cores are free, all threads read weights faster than one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads if num_threads == 1 or _all_come(num_threads) else 1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _all_come(num_threads: int) -> bool:
    """Whether an operation takes all threads less long than one: in the sum of some rounds, of fewer if it is clear."""
    by_all = by_one = 0.0
    for _ in range(_ROUNDS):
        by_all += _seconds(num_threads)
        by_one += _seconds(1)
        if by_all > 2 * by_one + _CLEAR_S:
            break
    return by_all < by_one


def _seconds(num_threads: int) -> float:
    """That an operation takes with so many threads, which are those of operators from then on."""
    numbers = torch.zeros(_NUMBERS)
    torch.set_num_threads(num_threads)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        numbers.sin_()
    return time.perf_counter() - start

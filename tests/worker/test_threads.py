"""Models are looked at by as many threads as come at once, and torch has what it had afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from shardwright.worker import threads
from shardwright.worker.threads import threads_that_come


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("by_all", "used"), [(0.001, 3), (0.003, 1), (1.0, 1)])
def test_all_threads_are_used_if_they_are_faster_than_one(
    by_all: float, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_seconds", lambda num_threads: 0.002 if num_threads == 1 else by_all)
    with contextlib.suppress(KeyError), threads_that_come():
        assert torch.get_num_threads() == used
        raise KeyError
    assert torch.get_num_threads() == 3


def test_one_slow_moment_of_many_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0] * 5 + [0.03] + [0.0] * 5)
    monkeypatch.setattr(threads, "_seconds", lambda num_threads: 0.002 if num_threads == 1 else 0.001 + next(waits))
    with threads_that_come():
        assert torch.get_num_threads() == 1


def test_a_busy_machine_is_soon_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seconds(num_threads: int) -> float:
        asked.append(num_threads)
        return 0.002 if num_threads == 1 else 0.2

    monkeypatch.setattr(threads, "_seconds", seconds)
    with threads_that_come():
        assert asked == [3, 1]


def test_where_there_is_one_thread_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_all_come", None)
    torch.set_num_threads(1)
    with threads_that_come():
        assert torch.get_num_threads() == 1


def test_what_an_operation_takes_is_measured() -> None:
    assert 0 < threads._seconds(2) < 60
    assert torch.get_num_threads() == 2

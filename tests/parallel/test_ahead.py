"""Batches are carried out beside the caller, in order, and none after one that failed."""

from __future__ import annotations

from threading import Event, get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwright.errors import StepFailedError
from shardwright.parallel.ahead import AheadExecutor
from shardwright.worker.batch import Batch, StepResult

TIMEOUT_S = 60


class Inline:
    """Carries out a batch once it may; the token of a batch is that of its first row. Row 13 fails."""

    info = SimpleNamespace(device="cpu")
    groups: tuple[()] = ()

    def __init__(self) -> None:
        self.may_go_on = Event()
        self.rows: list[int] = []
        self.threads: list[tuple[int, int]] = []
        self.num_restarts = 0
        self.is_closed = False

    def submit(self, batch: Batch) -> None:
        assert self.may_go_on.wait(TIMEOUT_S)
        self.rows += batch.rows
        self.threads.append((get_ident(), torch.get_num_threads()))
        if batch.rows == [13]:
            raise MemoryError("too large")

    def collect(self) -> StepResult:
        return StepResult(token_ids=[self.rows[-1]], logprobs={}, prompt_logprobs={})

    def restart(self) -> None:
        self.num_restarts += 1

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def inline() -> Inline:
    return Inline()


@pytest.fixture
def executor(inline: Inline) -> AheadExecutor:
    unchecked: Any = inline
    return AheadExecutor(unchecked)


def batch(row: int) -> Batch:
    return Batch(rows=[row], num_computed=[0], num_tokens=[1], new_rows=[], table_updates=[])


def test_batches_are_carried_out_in_order_while_the_caller_goes_on(inline: Inline, executor: AheadExecutor) -> None:
    executor.submit(batch(1))
    executor.submit(batch(2))
    assert inline.rows == []
    inline.may_go_on.set()
    assert [executor.collect().token_ids for _ in range(2)] == [[1], [2]]
    (thread, num_threads), other = inline.threads
    assert (thread, num_threads) == other
    assert thread != get_ident()
    assert num_threads == torch.get_num_threads()
    executor.close()
    assert inline.is_closed


def test_what_follows_a_batch_that_failed_is_not_carried_out(inline: Inline, executor: AheadExecutor) -> None:
    executor.submit(batch(13))
    executor.submit(batch(2))
    inline.may_go_on.set()
    with pytest.raises(StepFailedError, match="MemoryError: too large") as failure:
        executor.collect()
    assert isinstance(failure.value.error, MemoryError)
    assert inline.rows == [13]
    executor.submit(batch(3))
    assert executor.collect().token_ids == [3]
    executor.close()


def test_a_restart_waits_for_what_runs_and_forgets_it(inline: Inline, executor: AheadExecutor) -> None:
    executor.submit(batch(13))
    executor.submit(batch(2))
    inline.may_go_on.set()
    executor.restart()
    assert inline.num_restarts == 1
    executor.submit(batch(3))
    assert executor.collect().token_ids == [3]
    executor.close()

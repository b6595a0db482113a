"""Ranks as threads: deterministic sums, and no rank waits for one that will not come."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.errors import PlanError
from shardwright.layers.collectives import Collectives
from shardwright.plans.threads import CollectiveMismatchError, MemoryLink, ThreadCollectives, run_ranks


def test_results_come_in_the_order_of_ranks() -> None:
    def slow_first(group: ThreadCollectives) -> tuple[int, int]:
        time.sleep(0.02 * (group.size - group.rank))
        return group.rank, group.size

    assert run_ranks(3, slow_first) == [(0, 3), (1, 3), (2, 3)]


@given(size=st.integers(1, 5), calls=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_sums_are_the_same_bits_on_every_rank_and_in_every_run(size: int, calls: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(calls, size, 7, generator=generator) * 1e4

    def work(group: ThreadCollectives) -> list[Tensor]:
        results = []
        for call in range(calls):
            time.sleep(random.random() / 5000)
            tensor = parts[call, group.rank].clone()
            result = group.all_reduce(tensor)
            results.append(result.clone())
            tensor.zero_()  # callers may write over both
            result.zero_()
        return results

    expected = parts[:, 0].clone()
    for rank in range(1, size):
        expected += parts[:, rank]
    for results in run_ranks(size, work):
        assert torch.equal(torch.stack(results), expected)


def test_uneven_parts_are_gathered_on_every_rank_or_on_the_first() -> None:
    whole = torch.arange(2 * 9.0).reshape(2, 9)
    sizes = [4, 3, 2]

    def work(group: Collectives) -> tuple[Tensor, Tensor | None]:
        part = whole.split(sizes, dim=-1)[group.rank]
        return group.all_gather(part, sizes), group.gather(part, sizes)

    for rank, (everywhere, on_first) in enumerate(run_ranks(3, work)):
        assert torch.equal(everywhere, whole)
        if rank == 0:
            assert on_first is not None
            assert torch.equal(on_first, whole)
        else:
            assert on_first is None


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_the_error_of_a_rank_ends_the_wait_of_the_others(guilty: int) -> None:
    def work(group: ThreadCollectives) -> Tensor:
        if group.rank == guilty:
            time.sleep(0.02)
            raise ZeroDivisionError("the guilty one")
        return group.all_reduce(torch.ones(1))

    with pytest.raises(ZeroDivisionError, match="the guilty one"):
        run_ranks(3, work)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_returns_early_is_named(gone: int) -> None:
    def work(group: ThreadCollectives) -> None:
        if group.rank != gone:
            group.all_reduce(torch.ones(2, 3))

    with pytest.raises(CollectiveMismatchError, match=rf"waits in all_reduce of \[2, 3\] for rank {gone}, which has"):
        run_ranks(2, work)


def test_different_calls_are_named() -> None:
    def different_shapes(group: ThreadCollectives) -> None:
        group.all_reduce(torch.ones(2 + group.rank % 2))

    def different_calls(group: ThreadCollectives) -> None:
        if group.rank == 0:
            group.all_reduce(torch.ones(2))
        else:
            group.all_gather(torch.ones(1), [1, 1, 1])

    for work in (different_shapes, different_calls):
        with pytest.raises(CollectiveMismatchError, match="calls all_reduce of"):
            run_ranks(3, work)


def test_a_part_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(CollectiveMismatchError, match="rank 1 has 2 features to gather, but 3 are its part"):
        run_ranks(2, lambda group: group.all_gather(torch.ones(2), [2, 3]))


def test_ranks_run_with_the_callers_setting_of_gradients() -> None:
    with torch.no_grad():
        assert run_ranks(2, lambda group: torch.is_grad_enabled()) == [False, False]
    assert run_ranks(2, lambda group: torch.is_grad_enabled()) == [True, True]


def test_a_link_hands_over_copies_in_order() -> None:
    link, first = MemoryLink(), torch.ones(2)
    link.send([first])
    link.send([torch.zeros(1), torch.ones(1)])
    first.zero_()
    assert link.recv()[0].tolist() == [1, 1]
    assert len(link.recv()) == 2
    with pytest.raises(PlanError, match="handed over nothing"):
        link.recv()

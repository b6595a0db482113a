"""Outputs of ranks beside the model's: whole, in parts, or as sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.plans.prove.compare import Slicing, State, compare, difference

WHOLE = torch.linspace(-2, 2, 60).reshape(5, 12)
HALVES = Slicing(6, (((0, 3),), ((3, 6),)))
PACKED = Slicing(12, (((0, 2), (6, 8)), ((2, 6), (8, 12))))


def test_whole_outputs_are_equal_on_every_rank() -> None:
    assert compare(WHOLE, [WHOLE.clone(), WHOLE + 1e-6], []).state is State.WHOLE
    found = compare(WHOLE, [WHOLE.clone(), WHOLE + 0.01], [])
    assert found.state is State.DIVERGED
    assert found.max_abs_diff == pytest.approx(0.01, rel=1e-3)
    assert found.tolerance == pytest.approx(2e-4)


def test_sums_are_recognised_before_they_are_added_up() -> None:
    assert compare(WHOLE, [0.3 * WHOLE, 0.7 * WHOLE], []).state is State.PARTIAL_SUM
    assert compare(WHOLE, [0.3 * WHOLE, 0.8 * WHOLE], []).state is State.DIVERGED


def test_parts_are_those_that_parameters_are_cut_into() -> None:
    halves = WHOLE.split(6, dim=1)
    assert compare(WHOLE, halves, [PACKED, HALVES]).state is State.PART
    swapped = compare(WHOLE, halves[::-1], [PACKED, HALVES])
    assert swapped.state is State.DIVERGED
    assert swapped.max_abs_diff == pytest.approx(float((halves[0] - halves[1]).abs().max()))
    packed = [WHOLE[:, [0, 1, 6, 7]], WHOLE[:, [2, 3, 4, 5, 8, 9, 10, 11]]]
    assert compare(WHOLE, packed, [HALVES, PACKED]).state is State.PART


def test_parts_of_no_known_cut_do_not_fit() -> None:
    found = compare(WHOLE, [WHOLE[:, :5], WHOLE[:, 5:]], [HALVES, PACKED])
    assert (found.state, found.max_abs_diff) == (State.DIVERGED, None)
    assert compare(WHOLE, [WHOLE[:, None], WHOLE[:, None]], [HALVES]).state is State.DIVERGED


@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5), scale=st.integers(1, 3), dim=st.integers(0, 1))
def test_cuts_are_found_again_in_finer_dimensions(sizes: list[int], scale: int, dim: int) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    way = Slicing(ends[-1], tuple(((end - size, end),) for end, size in zip(ends, sizes, strict=True)))
    shape = [3, 3]
    shape[dim] = ends[-1] * scale
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = reference.split([size * scale for size in sizes], dim=dim)
    if shape[dim] != 3 or len({part.shape for part in parts}) > 1:
        assert compare(reference, parts, [way]).state is State.PART


def test_differences_count_numbers_that_are_none() -> None:
    inf, nan = float("inf"), float("nan")
    masked = torch.tensor([1.0, -inf, nan])
    assert difference(masked, masked.clone()) == 0
    assert difference(masked, torch.tensor([1.0, 0.0, nan])) == inf
    assert difference(masked, torch.tensor([1.0, -inf, 0.0])) == inf
    assert compare(torch.ones(3), [torch.ones(3), torch.full((3,), nan)], []).state is State.DIVERGED

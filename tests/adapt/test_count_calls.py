"""Calls that may count tokens are known, and numbered by their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwright.adapt.count_calls import Count, CountCalls, counted, dtype_of_count, leading_slice


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((5,), {}),
        ((0, 5), {}),
        ((0, 5, 1), {}),
        ((0,), {"end": 5}),
        ((), {"end": 5}),
        ((), {"start": 0, "end": 5, "device": "cpu"}),
        ((5.0,), {}),
        ((torch.tensor(5),), {"dtype": torch.float32}),
    ],
)
def test_counts_from_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = torch.arange(*args, **kwargs)
    assert counted(args, kwargs) == 5 == len(expected)
    assert dtype_of_count(args, kwargs) is expected.dtype


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 5), {}),
        ((0, 5, 2), {}),
        ((5,), {"step": 2}),
        ((1,), {"end": 5}),
        ((0.0, 1.0, 0.2), {}),
        ((4.5,), {}),
        ((torch.tensor(5, device="meta"),), {}),
    ],
)
def test_other_ranges(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert counted(args, kwargs) is None


def test_calls_are_numbered_by_kind_and_table() -> None:
    one, other, unknown = (torch.randn(32, 6) for _ in range(3))
    calls = CountCalls([one, other])
    for _ in range(2):
        seen = [
            calls.see(torch.arange, (3, 8), {}),
            calls.see(torch.Tensor.__getitem__, (one, slice(5)), {}),
            calls.see(torch.Tensor.__getitem__, (other, slice(6)), {}),
            calls.see(torch.Tensor.__getitem__, (unknown, slice(5)), {}),
            calls.see(torch.Tensor.__getitem__, (one, 5), {}),
            calls.see(torch.Tensor.add, (one, 5), {}),
            calls.see(torch.arange, (7,), {}),
            calls.see(torch.Tensor.__getitem__, (one, slice(8)), {}),
        ]
        assert [None if call is None else (call.count, call.length) for call in seen] == [
            (Count(None, 0), None),
            (Count(id(one), 0), 5),
            (Count(id(other), 0), 6),
            None,
            None,
            None,
            (Count(None, 1), 7),
            (Count(id(one), 1), 8),
        ]
        calls.restart()


def test_running_sums_of_ones_and_narrowed_tables_count_too() -> None:
    table = torch.randn(32, 6)
    calls = CountCalls([table])
    seen = [
        calls.see(torch.cumsum, (torch.ones(1, 7), 1), {}),
        calls.see(torch.Tensor.cumsum, (torch.ones(7, 1, dtype=torch.bool),), {"dim": 0}),
        calls.see(torch.cumsum, (torch.ones(4, 1), -1), {}),
        calls.see(torch.cumsum, (torch.tensor([1, 1, 0]), 0), {}),
        calls.see(torch.cumsum, (torch.ones(3, 7), 1), {}),
        calls.see(torch.Tensor.narrow, (table, 0, 0, 5), {}),
        calls.see(torch.narrow, (table,), {"dim": -2, "start": 0, "length": 6}),
        calls.see(torch.narrow, (table, 0, 1, 5), {}),
    ]
    assert [None if call is None else (call.count, call.length) for call in seen] == [
        (Count("cumsum", 0), 7),
        (Count("cumsum", 1), 7),
        (Count("cumsum", 2), 1),
        (Count("cumsum", 3), None),
        (Count("cumsum", 4), None),
        (Count(id(table), 0), 5),
        (Count(id(table), 1), 6),
        None,
    ]


def test_what_is_written_into_is_no_table() -> None:
    cache = torch.zeros(32, 6)
    calls = CountCalls([cache])
    for _ in range(2):
        assert calls.see(torch.Tensor.__getitem__, (cache, slice(5)), {}) is not None
        assert calls.see(torch.Tensor.__setitem__, (cache, slice(5), 0), {}) is None
        assert calls.see(torch.Tensor.__getitem__, (cache, slice(5)), {}) is None
        calls.restart()


@pytest.mark.parametrize(
    ("shape", "index", "dim"),
    [
        ((32, 6), slice(13), 0),
        ((32, 6), slice(0, 13), 0),
        ((32, 6), (slice(13), None), 0),
        ((1, 32, 6), (slice(None), slice(13)), 1),
        ((1, 1, 32, 6), (slice(None), slice(None), slice(13), Ellipsis), 2),
        ((1, 1, 32, 6), (Ellipsis, slice(13), slice(None)), 2),
        ((4, 32, 6), (0, slice(13)), 1),
        ((1, 32, 6), (None, slice(None), slice(13)), 1),
    ],
)
def test_slices_of_leading_rows(shape: tuple[int, ...], index: Any, dim: int) -> None:
    table = torch.randn(shape)
    part = leading_slice(table, index)
    assert part is not None
    assert (part.dim, part.stop) == (dim, 13)
    rows = table.index_select(part.dim, torch.arange(13))
    assert torch.equal(rows[part.without_stop()], table[index])


@pytest.mark.parametrize(
    "index", [slice(1, 13), slice(0, 13, 2), slice(None), 5, (slice(13), slice(13)), torch.arange(3), (slice(13), [0])]
)
def test_other_indices(index: Any) -> None:
    assert leading_slice(torch.randn(32, 32), index) is None

"""Results on "meta" that are remembered are those that PyTorch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.plans.flow.meta_results import run_on_meta

aten: Any = torch.ops.aten


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.storage_offset()


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.mul.Tensor, (empty(2, 3), empty(3)), {}),
        (aten.mul.Tensor, (empty(2, 3, dtype=torch.int64), 2), {}),
        (aten.mul.Tensor, (empty(2, 3, dtype=torch.int64), 2.0), {}),
        (aten.mul.Tensor, (empty(2, 3, dtype=torch.int64), True), {}),
        (aten.add.Tensor, (empty(3, 2).t(), empty(3, 2).t()), {"alpha": 2}),
        (aten.mm.default, (empty(2, 3), empty(3, 4)), {}),
        (aten.cat.default, ([empty(2, 3), empty(1, 3)],), {}),
        (aten.mean.dim, (empty(2, 3), [-1], True), {}),
        (aten._to_copy.default, (empty(2, 3),), {"dtype": torch.bfloat16}),
        (aten.topk.default, (empty(2, 3), 2), {}),
        (aten.split.Tensor, (empty(4, 3), 2), {}),
    ],
)
def test_the_second_result_is_as_the_first(func: Any, args: Any, kwargs: Any) -> None:
    expected = func(*args, **kwargs)
    wanted = [expected] if isinstance(expected, Tensor) else list(expected)
    for _ in range(2):
        result = run_on_meta(func, args, kwargs)
        found = [result] if isinstance(result, Tensor) else list(result)
        assert [form(tensor) for tensor in found] == [form(tensor) for tensor in wanted]


@pytest.mark.parametrize("func", [aten.view.default, aten._unsafe_view.default])
def test_a_view_stays_one(func: Any) -> None:
    for _ in range(2):
        given = empty(2, 3)
        result = run_on_meta(func, (given, [6]), {})
        assert result.untyped_storage()._cdata == given.untyped_storage()._cdata


def test_what_writes_is_run() -> None:
    for _ in range(2):
        given = empty(2, 3)
        assert run_on_meta(aten.add_.Tensor, (given, 1), {}) is given


def test_results_are_tensors_of_their_own() -> None:
    first, second = (run_on_meta(aten.neg.default, (empty(5),), {}) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_the_default_type_counts() -> None:
    given = empty(3, dtype=torch.int64)
    assert run_on_meta(aten.sqrt.default, (given,), {}).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert run_on_meta(aten.sqrt.default, (given,), {}).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_errors_are_those_of_the_operation() -> None:
    with pytest.raises(RuntimeError):
        run_on_meta(aten.mm.default, (empty(2, 3), empty(4, 5)), {})

"""What is said to be carried out together is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.replay.functions import WIDTH, Function, program_of, table_of
from tests.replay.test_program import rotary
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.replay.passes import Cost, Run, passes_of

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

WEIGHTS = torch.randn(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * WEIGHTS[0, 0]


def block(x: Tensor, _: Tensor) -> Tensor:
    """A norm, two products of it, one gated by the other, and a residual that is normed."""
    y = norm(x)
    return norm(x + F.silu(F.linear(y, WEIGHTS[0])) * F.linear(y, WEIGHTS[1]))


def between_norms(x: Tensor, _: Tensor) -> Tensor:
    return norm(x + norm(x * 2))


def biased(x: Tensor, _: Tensor) -> Tensor:
    return (x + WEIGHTS[0, 0]) * 2


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (block, ["norm", "silu + gate + residual + norm"]),
        (between_norms, ["norm + residual + norm"]),
        (biased, ["elementwise"]),
        (rotary, ["cos, sin", "rotary"]),
    ],
)
def test_runs_are_called_by_what_they_do(function: Function, names: list[str]) -> None:
    assert [run.what for run in passes_of(program_of(function, table_of(torch.float32))).runs] == names


def test_products_of_one_input_are_counted_once() -> None:
    passes = passes_of(program_of(block, table_of(torch.float32)))
    [weights] = passes.products
    assert [weight.data_ptr() for weight in weights] == [part.data_ptr() for part in WEIGHTS]
    assert passes.runs[0] == Run("norm", 6)
    # rows of the embedding, the norm, both products, and the rest
    assert passes.step == Cost(1 + 6 + 2 + 2 + 1 + 6, 4)
    assert (passes.layer, passes.by_torch) == (None, 0)

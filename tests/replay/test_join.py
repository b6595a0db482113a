"""Products of one input are carried out together, and only where nothing stands between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.replay.functions import WIDTH, Function, features, inputs_of, program_of, table_of
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.replay.instructions import Operation

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

WEIGHTS = torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(1))


def gated(x: Tensor, _: Tensor) -> Tensor:
    """The second product comes after what is done to the first."""
    return F.silu(F.linear(x, WEIGHTS[0])) * F.linear(x, WEIGHTS[1])


def three(x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, WEIGHTS[0]) + F.linear(x, WEIGHTS[1], WEIGHTS[0, :, 0]) * F.linear(x, WEIGHTS[2])


def changed_between(x: Tensor, _: Tensor) -> Tensor:
    y = x * 2
    first = F.linear(y, WEIGHTS[0])
    y += 1
    return first + F.linear(y, WEIGHTS[1])


def written_into(x: Tensor, _: Tensor) -> Tensor:
    y = x + 1
    first = F.linear(y, WEIGHTS[0])
    out = first * 2
    torch.mm(y, WEIGHTS[1].T, out=out)
    return first + out


@pytest.mark.parametrize(("function", "num_joined"), [(gated, 1), (three, 2), (changed_between, 0), (written_into, 0)])
def test_products_of_one_input_are_joined(function: Function, num_joined: int) -> None:
    table = table_of(torch.float32)
    program = program_of(function, table)
    is_linear = program._base[:, 0] == Operation.LINEAR
    assert int(program._base[is_linear, 1].sum()) == num_joined
    for count in (1, 4, 9):
        inputs = inputs_of(count, seed=4)
        expected = function(features(inputs, table), inputs.position_ids)
        torch.testing.assert_close(program.run(inputs), expected, rtol=1e-5, atol=1e-4)

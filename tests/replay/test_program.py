"""What is repeated natively is what PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replay.functions import ROWS, WIDTH, Function, features, inputs_of, program_of, table_of
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.kernels.jit import native_library
from shardwright.replay.program import OutOfRangeError

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

GENERATOR = torch.Generator().manual_seed(2)
WEIGHT = torch.randn(31, WIDTH, generator=GENERATOR)
BIAS = torch.randn(31, generator=GENERATOR)
SCALE = torch.rand(WIDTH, generator=GENERATOR) + 0.5
TABLE = torch.randn(ROWS, 8, generator=GENERATOR)
FREQUENCIES = torch.rand(4, generator=GENERATOR)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.to(x.dtype)


def rms_norm(x: Tensor, _: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return like(SCALE, x) * normed.to(x.dtype)


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    heads = x.view(1, len(x), 3, 8).transpose(1, 2)
    angles = (FREQUENCIES[None, :, None].expand(1, -1, 1) @ positions[None, None].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = heads.chunk(2, dim=-1)
    turned = heads * cos + torch.cat((-b, a), dim=-1) * sin
    return turned.transpose(1, 2).reshape(len(x), -1)


def in_place(x: Tensor, _: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total += torch.full_like(x, 3.0)
    total += x
    total[:, :4] = 7.0
    total[:, 4:8].mul_(2)
    return total


def pieces(x: Tensor, _: Tensor) -> Tensor:
    a, b, c = x.split([4, 8, 12], dim=-1)
    return torch.cat((c, torch.stack((b, b * 2), dim=1).flatten(1), a), dim=1)


def constant_table(x: Tensor, positions: Tensor) -> Tensor:
    angles = torch.arange(ROWS)[:, None] * FREQUENCIES
    return torch.cat((angles.cos()[positions].to(x.dtype), like(TABLE, x)[positions], x), dim=1)


FUNCTIONS: dict[str, Function] = {
    "linear": lambda x, _: F.linear(x, like(WEIGHT, x), like(BIAS, x)),
    "linear without bias": lambda x, _: x @ like(WEIGHT, x).T,
    "weight of inputs first": lambda x, _: torch.addmm(like(BIAS, x), x, like(WEIGHT, x).T.contiguous()),
    "batched linear": lambda x, _: F.linear(x.view(1, len(x), WIDTH), like(WEIGHT, x))[0],
    "product of activations": lambda x, _: (x.view(-1, 3, 8) @ x.view(-1, 8, 3)).flatten(1),
    "rms norm": rms_norm,
    "fused rms norm": lambda x, _: F.rms_norm(x, (WIDTH,), like(SCALE, x), 1e-6),
    "layer norm": lambda x, _: F.layer_norm(x, (WIDTH,), like(SCALE, x), like(SCALE, x), 1e-5),
    "layer norm without weights": lambda x, _: F.layer_norm(x, (WIDTH,)),
    "rotary": rotary,
    "swiglu": lambda x, _: F.silu(x[:, :12]) * x[:, 12:],
    "gelus": lambda x, _: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "relu, squared": lambda x, _: F.relu(x).square(),
    "softmax": lambda x, _: x.view(-1, 4, 6).softmax(1).flatten(1),
    "soft cap": lambda x, _: torch.tanh(x / 30) * 30,
    "reductions": lambda x, _: torch.stack((x.sum(-1), x.amax(1), x.mean(dim=-1)), dim=1),
    "reduction of a middle dimension": lambda x, _: x.view(-1, 3, 8).sum(1),
    "elementwise": lambda x, _: (1 - x) / (x.abs() + 2) - x.exp().clamp_min(0.1).log() + x.abs().sqrt().reciprocal(),
    "powers": lambda x, _: x.pow(3) + x.abs() ** 0.5 + torch.rsqrt(x * x + 1),
    "clamped": lambda x, _: x.clamp(-0.5, 0.5) + x.clamp(max=0.1) + x.clamp_min(0.2) + x.clamp(min=-1),
    "extremes": lambda x, _: torch.maximum(x, x.flip(0) * 0) - torch.minimum(x, x * 2),
    "scaled sum": lambda x, _: torch.add(x, x * 2, alpha=3) + torch.sub(x, 2, alpha=4),
    "condition": lambda x, _: torch.where(x > 0, x, x * 0.1).masked_fill(x > 1, -4.0),
    "in place": in_place,
    "pieces": pieces,
    "position table": constant_table,
    "counted positions": lambda x, p: (p + 2).to(x.dtype)[:, None] * x,
    "selected rows": lambda x, p: like(TABLE, x).index_select(0, p),
    "a look at a constant": lambda x, _: x * (TABLE.abs() + 1).amax().item() if bool(TABLE[0, 0] != 9) else x,
    "sorted": lambda x, _: x.sort(-1).values,
    "top 2": lambda x, _: torch.cat([part.to(x.dtype) for part in x.topk(2, dim=-1)], dim=1),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_operations_are_those_of_torch(function: Function, dtype: torch.dtype) -> None:
    table = table_of(dtype)
    program = program_of(function, table)
    for count in (1, 2, 4, 16):
        inputs = inputs_of(count, seed=9)
        expected = function(features(inputs, table), inputs.position_ids)
        actual = program.run(inputs)
        assert actual.dtype is expected.dtype
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


LEFT_TO_TORCH = ("sorted", "top 2", "counted positions", "extremes", "condition", "scaled sum")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in LEFT_TO_TORCH])
def test_what_models_are_made_of_is_not_left_to_torch(name: str) -> None:
    assert program_of(FUNCTIONS[name], table_of(torch.bfloat16)).num_host_calls == 0


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 64),
    inner=st.integers(1, 70),
    outer=st.integers(1, 90),
    seed=st.integers(0, 99),
    wide=st.booleans(),
)
def test_linears_of_all_sizes(tokens: int, inner: int, outer: int, seed: int, wide: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if wide else torch.bfloat16
    weight, table = (torch.randn(n, inner, generator=generator).to(dtype) for n in (outer, ROWS))
    program = program_of(lambda x, _: x @ weight.T, table, (2, 3, 64))
    inputs = inputs_of(tokens, seed)
    expected = features(inputs, table).double() @ weight.T.double()
    bound = 1e-5 if wide else 1e-2
    torch.testing.assert_close(program.run(inputs).double(), expected, rtol=bound, atol=bound * inner**0.5)


def test_an_index_out_of_range_is_said_and_nothing_is_read() -> None:
    program = program_of(lambda x, p: TABLE[: ROWS - 5][p.clamp_max(ROWS - 6) * 1], table_of(torch.float32))
    assert program.num_host_calls == 2
    short = program_of(lambda x, p: TABLE[p], table_of(torch.float32))
    inputs = inputs_of(3)
    inputs.position_ids[1] = ROWS
    with pytest.raises(OutOfRangeError):
        short.run(inputs)


def remembering() -> Function:
    seen: list[Tensor] = []

    def function(x: Tensor, _: Tensor) -> Tensor:
        seen.append(x.sum(0, keepdim=True))
        return x + seen[0]

    return function


def counting() -> Function:
    count = torch.zeros(1)

    def function(x: Tensor, _: Tensor) -> Tensor:
        count.add_(1)
        return x * count

    return function


UNREPEATABLE: dict[str, Callable[[], Function]] = {
    "branch on a value": lambda: lambda x, _: x * 2 if x.sum() > 0 else x,
    "branch on the size": lambda: lambda x, _: x * 2 if len(x) > 2 else x + 1,
    "square of the size": lambda: lambda x, _: x + (x @ x.T).sum() * torch.ones(len(x) ** 2).sum(),
    "a tensor kept from the first step": remembering,
    "a counter": counting,
    "random numbers": lambda: lambda x, _: x + torch.rand(WIDTH),
    "a shape that values decide": lambda: lambda x, _: x[x[:, 0] > -9] * 1,
}


@pytest.mark.parametrize("make", UNREPEATABLE.values(), ids=UNREPEATABLE.keys())
def test_code_that_does_something_else_each_time_is_not_repeated(make: Callable[[], Function]) -> None:
    with pytest.raises(UnsupportedModelError):
        program_of(make(), table_of(torch.float32))

"""Runs of operations, carried out row by row, give what they give one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replay.functions import WIDTH, Function, features, inputs_of, program_of, table_of
from tests.replay.test_program import rms_norm, rotary
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.replay import fuse
from shardwright.replay.instructions import Operation

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

HALF = WIDTH // 2


def write_half(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, HALF:] = y[:, :HALF]
    return x


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def shift_in_place(x: Tensor, y: Tensor) -> Tensor:
    """Every row gets what another one is."""
    x.mul_(2)
    x[1:] = x[:-1].clone() + y[1:]
    return x


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "gate": lambda x, y: torch.sigmoid(x) * y,
    "center": lambda x, _: x - x.mean(-1, keepdim=True),
    "largest": lambda x, y: y / (1 + x.abs().amax(-1, keepdim=True)),
    "turn": lambda x, _: torch.cat((-x[:, HALF:], x[:, :HALF]), dim=-1),
    "swap in parts": lambda x, y: torch.cat((y[:, 8:], x[:, :8]), dim=-1),
    "narrow": lambda x, _: x.bfloat16().to(x.dtype),
    "widen": lambda x, _: (x.float() * 1.5).to(x.dtype),
    "write half": write_half,
    "add in place": add_in_place,
    "shift in place": shift_in_place,
    "heads": lambda x, y: (x.view(-1, 3, 8) * y.view(-1, 3, 8).mean(-1, keepdim=True)).flatten(1),
    "heads first": lambda x, _: (x.view(-1, 3, 8).transpose(0, 1) * 0.5).transpose(0, 1).flatten(1),
    "every other": lambda x, y: torch.cat(((x + y)[:, ::2], (x * y)[:, 1::2]), dim=-1),
    "last one": lambda x, y: x * (x + y)[:, -1:],
    "where": lambda x, y: torch.where(x > 0, x, y * 0.1),
}


def chained(steps: list[tuple[str, int]]) -> Function:
    """Each step by its name, of what the last one gave and what one before it did: all of their results."""

    def function(x: Tensor, positions: Tensor) -> Tensor:
        values = [x, (x * 0.5 + 1).cos()]
        for name, other in steps:
            values.append(STEPS[name](values[-1], values[other % len(values)]))
        return torch.stack(values[1:], dim=1).flatten(1)

    return function


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), min_size=1, max_size=7),
    tokens=st.integers(1, 16) | st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_runs_are_those_of_torch(steps: list[tuple[str, int]], tokens: int, dtype: torch.dtype) -> None:
    table = table_of(dtype)
    inputs = inputs_of(tokens, seed=3)
    function = chained(steps)
    expected = function(features(inputs, table), inputs.position_ids)
    actual = program_of(function, table).run(inputs)
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("function", "num_single"),
    [(rms_norm, 0), (rotary, 5), (lambda x, _: torch.nn.functional.silu(x[:, :12]) * x[:, 12:], 0)],
)
def test_what_models_are_made_of_is_one_run(function: Function, num_single: int) -> None:
    program = program_of(function, table_of(torch.bfloat16))
    alone, place = 0, 0
    while place < len(program._base):
        is_fusible = Operation.COPY <= program._base[place, 0] <= Operation.AMAX
        count = max(int(program._base[place, 12]), 1) if is_fusible else 1
        alone += is_fusible and count == 1
        place += count
    assert alone <= num_single


def test_rows_that_are_too_long_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "MOST_FEATURES", WIDTH - 1)
    program = program_of(rms_norm, table_of(torch.float32))
    assert not program._base[program._base[:, 0] == Operation.SQUARE, 12].any()

"""Runs that were compiled give what their operations give one after another, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replay.functions import Function, features, inputs_of, program_of, table_of
from tests.replay.test_fuse import STEPS
from tests.replay.test_program import FUNCTIONS, rms_norm, rotary
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.replay import compile_runs
from shardwright.replay.compile_runs import FUNCTION
from shardwright.replay.program import Program

pytestmark = pytest.mark.skipif(native_library("replay") is None, reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> object:
    """Small programs are worth it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_runs, "WORTH_COMPILING", 0)
        yield


def num_functions(program: Program) -> int:
    """Of runs that are carried out by functions of their own."""
    return int((program.listed(2)[:, FUNCTION] != 0).sum())


def assert_same_bits(function: Function, table: Tensor, *steps: int) -> int:
    """For steps of so many tokens. Returns how many functions there were."""
    compiled, interpreted = program_of(function, table), program_of(function, table)
    interpreted._compiled.finish(waits=True)  # and not taken
    compiled.take_compiled(waits=True)
    assert num_functions(interpreted) == 0
    whole = torch.int32 if table.dtype is torch.float32 else torch.int16
    tolerance = 1e-4 if table.dtype is torch.float32 else 5e-2
    for tokens in steps:
        inputs = inputs_of(tokens, seed=3)
        one_by_one, at_once = interpreted.run(inputs), compiled.run(inputs)
        assert torch.equal(at_once.contiguous().view(whole), one_by_one.contiguous().view(whole))
        expected = function(features(inputs, table), inputs.position_ids)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(at_once, expected, rtol=tolerance, atol=tolerance * scale)
    return num_functions(compiled)


@settings(max_examples=10, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), min_size=3, max_size=9),
    tokens=st.integers(1, 16) | st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_random_runs_give_the_same_bits(steps: list[tuple[str, int]], tokens: int, dtype: torch.dtype) -> None:
    def function(x: Tensor, _: Tensor) -> Tensor:
        values = [x, (x * 0.5 + 1).cos()]
        for name, other in steps:
            values.append(STEPS[name](values[-1], values[other % len(values)]))
        return torch.stack(values[1:], dim=1).flatten(1)

    assert_same_bits(function, table_of(dtype), tokens)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_runs_of_no_rows_do_nothing(is_compiled: bool) -> None:
    program = program_of(lambda x, _: STEPS["shift in place"](x.clone(), x) * 2 + 1, table_of(torch.float32))
    if is_compiled:
        program.take_compiled(waits=True)
    inputs = inputs_of(1)
    torch.testing.assert_close(program.run(inputs), features(inputs, table_of(torch.float32)) * 4 + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_models_are_made_of_gives_the_same_bits(dtype: torch.dtype) -> None:
    def function(x: Tensor, positions: Tensor) -> Tensor:
        return torch.cat([of_one(x, positions).flatten(1) for of_one in FUNCTIONS.values()], dim=1)

    assert assert_same_bits(function, table_of(dtype), 1, 5, 37) >= 10


def test_a_row_may_be_changed_by_a_number_of_its_own() -> None:
    def function(x: Tensor, _: Tensor) -> Tensor:
        x = x * 1.5
        x *= x[:, :1]
        return x + 1

    table, inputs = table_of(torch.float32), inputs_of(6)
    program = program_of(function, table)
    program.take_compiled(waits=True)
    x = features(inputs, table) * 1.5
    assert num_functions(program) > 0
    torch.testing.assert_close(program.run(inputs), x * x[:, :1] + 1)


def test_layers_that_are_alike_share_a_function() -> None:
    def function(x: Tensor, positions: Tensor) -> Tensor:
        for _ in range(4):
            x = x + torch.sin(x @ torch.ones(len(x[0]), len(x[0]), dtype=x.dtype))
            x = rms_norm(x, positions).clone()
        return x

    program = program_of(function, table_of(torch.bfloat16))
    program.take_compiled(waits=True)
    assert num_functions(program) >= 4
    assert program._compiled.source.count('extern "C"') <= 2


def test_few_operations_are_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_runs, "WORTH_COMPILING", 1 << 16)
    program = program_of(rms_norm, table_of(torch.float32))
    program.take_compiled(waits=True)
    assert num_functions(program) == 0


def test_runs_of_too_many_tensors_are_carried_out_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_runs, "MOST_OPERANDS", 1)
    assert assert_same_bits(rotary, table_of(torch.bfloat16), 5) == 0


def test_steps_go_on_without_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_runs, "generated_library", lambda *_: None)
    assert assert_same_bits(rms_norm, table_of(torch.bfloat16), 5) == 0

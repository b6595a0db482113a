"""Runs that were compiled give what their operations give one after another, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replay import functions
from tests.replay.functions import Function, features, inputs_of, table_of
from tests.replay.test_fuse import STEPS, chained
from tests.replay.test_program import FUNCTIONS, rms_norm, rotary
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.replay import compile_runs
from shardwright.replay.compile_runs import FUNCTION
from shardwright.replay.program import Program

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def small_programs_are_worth_it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """And what is compiled for them goes with the tests."""
    assert native_library() is not None  # from the cache that is there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_runs, "WORTH_COMPILING", 0)
        patch.setenv("SHARDWRIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def program_of(function: Function, table: Tensor) -> Program:
    """Its runs are being compiled."""
    program = functions.program_of(function, table)
    program.compile_runs()
    return program


def num_functions(program: Program) -> int:
    """Of runs that are carried out by functions of their own."""
    return int((program.listed(2)[:, FUNCTION] != 0).sum())


def assert_same_bits(function: Function, table: Tensor, *steps: int) -> int:
    """For steps of so many tokens. Returns how many functions there were."""
    compiled, interpreted = program_of(function, table), functions.program_of(function, table)
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


@settings(max_examples=6, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), min_size=3, max_size=9),
    tokens=st.integers(1, 16) | st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_random_runs_give_the_same_bits(steps: list[tuple[str, int]], tokens: int, dtype: torch.dtype) -> None:
    assert_same_bits(chained(steps), table_of(dtype), tokens)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_runs_of_no_rows_do_nothing(is_compiled: bool) -> None:
    made_by = program_of if is_compiled else functions.program_of
    program = made_by(lambda x, _: STEPS["shift in place"](x.clone(), x) * 2 + 1, table_of(torch.float32))
    program.take_compiled(waits=True)
    inputs = inputs_of(1)
    torch.testing.assert_close(program.run(inputs), features(inputs, table_of(torch.float32)) * 4 + 1)


@pytest.mark.parametrize("limit", ["MOST_OPERANDS", "MOST_KEPT"])
def test_what_is_too_much_for_a_function_is_carried_out_one_by_one(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(compile_runs, limit, 1)
    assert assert_same_bits(rotary, table_of(torch.bfloat16), 5) == 0


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


def test_functions_are_taken_by_the_step_after_they_are_there() -> None:
    table, inputs = table_of(torch.bfloat16), inputs_of(4)
    program = functions.program_of(rms_norm, table)
    before = program.run(inputs).clone()
    assert not program._list(4, 4)[:, FUNCTION].any()
    program.compile_runs()
    assert program._compiled._thread is not None
    program._compiled._thread.join()
    assert torch.equal(program.run(inputs), before)
    assert program._list(4, 4)[:, FUNCTION].any()


def test_layers_that_are_alike_share_a_function() -> None:
    def function(x: Tensor, positions: Tensor) -> Tensor:
        for _ in range(4):
            x = x + torch.sin(x @ torch.ones(len(x[0]), len(x[0]), dtype=x.dtype))
            x = rms_norm(x, positions).clone()
        return x

    program = program_of(function, table_of(torch.bfloat16))
    program.take_compiled(waits=True)
    assert num_functions(program) >= 4
    assert program._compiled.source.count("EXPORTED") <= 2


def test_few_operations_are_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_runs, "WORTH_COMPILING", 1 << 16)
    program = program_of(rms_norm, table_of(torch.float32))
    program.take_compiled(waits=True)
    assert num_functions(program) == 0


def test_steps_go_on_without_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_runs, "generated_library", lambda *_: None)
    assert assert_same_bits(rms_norm, table_of(torch.bfloat16), 5) == 0

"""A step of which only some logits are wanted: other tokens are computed as far as to where these are taken out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.replay.functions import ROWS, WIDTH, inputs_of, table_of
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.replay.affine import common_recording
from shardwright.replay.program import Program
from shardwright.replay.trace import Trace, TraceMode

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

TABLE = table_of(torch.float32)
HEAD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3))


def once(ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    features = F.silu(F.embedding(ids, TABLE) + positions[:, None])
    return torch.tanh(F.linear(features.index_select(0, rows), HEAD)) * 3


def batched(ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    return F.linear((F.embedding(ids, TABLE)[None] * 2).index_select(1, rows)[0], HEAD).sort(-1)[0]


def never(ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    return F.linear(F.embedding(ids, TABLE), HEAD)


def twice(ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    features = F.embedding(ids, TABLE)
    return features.index_select(0, rows) + (features + 1).index_select(0, rows)


def all_again(ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """What is taken out meets what was not."""
    features = F.embedding(ids, TABLE) * 2
    return features.index_select(0, rows) + features


def program_of(function: object, *, most_tokens: int = 12, most_rows: int = 5) -> Program:
    traces: list[Trace] = []
    for seed, count in enumerate((2, 3, 5)):
        inputs, mode = inputs_of(count, seed), TraceMode(count)
        for name in ("input_ids", "position_ids", "logits_rows"):
            mode.trace.inputs[name] = mode.look_at(getattr(inputs, name)).storage
        with torch.no_grad(), mode:
            output = function(inputs.input_ids, inputs.position_ids, inputs.logits_rows)  # type: ignore[operator]
        mode.trace.output = mode.look_at(output)
        traces.append(mode.trace)
    return Program(common_recording(traces), most_tokens=most_tokens, most_rows=most_rows)


@pytest.mark.parametrize("function", [once, batched])
def test_logits_are_those_of_the_tokens_asked_for(function: object) -> None:
    program = program_of(function)
    for count, rows in ((12, [11]), (7, [0, 3, 6]), (5, [0, 1, 2, 3, 4]), (1, [0]), (12, [1, 2, 3, 8, 9])):
        assert program.takes(count, len(rows))
        inputs = replace(inputs_of(count, seed=count), logits_rows=torch.tensor(rows))
        expected = function(inputs.input_ids, inputs.position_ids, inputs.logits_rows)  # type: ignore[operator]
        torch.testing.assert_close(program.run(inputs), expected, rtol=1e-5, atol=1e-5)


def test_larger_steps_are_not_taken() -> None:
    program = program_of(once)
    assert not program.takes(13, 1)
    assert not program.takes(12, 6)


@pytest.mark.parametrize("function", [never, twice, all_again])
def test_without_one_place_where_tokens_are_taken_out_all_are_needed(function: object) -> None:
    program = program_of(function)
    assert not program.takes(4, 3)
    assert program.takes(4, 4)
    inputs = inputs_of(4, seed=2)
    expected = function(inputs.input_ids, inputs.position_ids, inputs.logits_rows)  # type: ignore[operator]
    torch.testing.assert_close(program.run(inputs), expected, rtol=1e-5, atol=1e-5)


def test_steps_are_smaller_where_memory_for_large_ones_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwright.replay.program.MOST_BYTES", 20_000)
    program = program_of(once, most_tokens=ROWS * 100)
    assert program.takes(60, 5)
    assert not program.takes(ROWS * 100, 5)

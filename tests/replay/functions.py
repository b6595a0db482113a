"""Functions of the tokens of a step, recorded and repeated without a model around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shardwright.adapt.paged import ForwardInputs
from shardwright.attention.layout import StepLayout
from shardwright.replay.affine import Recording, common_recording
from shardwright.replay.program import Program
from shardwright.replay.trace import Trace, TraceMode

WIDTH, ROWS = 24, 40
MOST_TOKENS = 90
Function = Callable[[Tensor, Tensor], Tensor]
"""Of features [T, WIDTH] and positions [T]."""


def inputs_of(num_tokens: int, seed: int = 0) -> ForwardInputs:
    generator = torch.Generator().manual_seed(seed)
    ids, positions = (torch.randint(ROWS, (num_tokens,), generator=generator) for _ in range(2))
    ones = np.ones(num_tokens, dtype=np.int64)
    layout = StepLayout(positions.numpy(), ones, np.arange(num_tokens + 1))
    return ForwardInputs(ids, positions, [], [], torch.arange(num_tokens), layout, [])


def features(inputs: ForwardInputs, table: Tensor) -> Tensor:
    return torch.nn.functional.embedding(inputs.input_ids, table)


def table_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def trace_of(function: Function, table: Tensor, num_tokens: int, seed: int = 0) -> Trace:
    inputs = inputs_of(num_tokens, seed)
    mode = TraceMode(num_tokens)
    for name in ("input_ids", "position_ids"):
        mode.trace.inputs[name] = mode.look_at(getattr(inputs, name)).storage
    with torch.no_grad(), mode:
        output = function(features(inputs, table), inputs.position_ids)
    mode.trace.output = mode.look_at(output)
    return mode.trace


def recording_of(function: Function, table: Tensor, sizes: Sequence[int] = (2, 3, 5)) -> Recording:
    return common_recording([trace_of(function, table, size, seed) for seed, size in enumerate(sizes)])


def program_of(function: Function, table: Tensor, sizes: Sequence[int] = (2, 3, 5)) -> Program:
    most = max(*sizes, MOST_TOKENS)
    return Program(recording_of(function, table, sizes), most_tokens=most, most_rows=most)

"""The activation of one half of each row times the other half."""

import triton
import triton.language as tl

from shardwright.kernels.triton.programs.rounding import rounded

SILU = tl.constexpr("silu")
GELU = tl.constexpr("gelu")
GELU_TANH = tl.constexpr("gelu_tanh")
RELU = tl.constexpr("relu")
SIGMOID = tl.constexpr("sigmoid")

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def gated(
    both,
    output,
    size,
    row_stride,
    gate_start,
    value_start,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (row, WIDTH of its numbers)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = column < size
    start = both + row * row_stride + column
    gate = tl.load(start + gate_start, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(start + value_start, mask=mask, other=0.0).to(tl.float32)
    gate = rounded(_activated(gate, ACTIVATION), output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * size + column, rounded(gate * values, output.dtype.element_ty), mask=mask)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        return gate * _sigmoid(gate)
    elif ACTIVATION == GELU:
        return 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh(a)) / 2 is the sigmoid of 2 * a, and a is sqrt(2 / pi) * (gate + ...)
        return gate * _sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
    elif ACTIVATION == RELU:
        return tl.where(gate > 0.0, gate, 0.0 * gate)  # not-a-number stays what it is
    else:
        return _sigmoid(gate)


@triton.jit
def _sigmoid(values):
    """Without powers that are too large."""
    power = tl.exp(-tl.abs(values))
    return tl.where(values < 0.0, power, 1.0) / (1.0 + power)

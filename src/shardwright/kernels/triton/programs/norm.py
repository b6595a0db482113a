"""A norm over rows: read once, kept in registers, written once."""

import triton
import triton.language as tl

from shardwright.kernels.triton.programs.rounding import rounded


@triton.jit
def norm(
    rows,
    weight,
    bias,
    output,
    num_rows,
    row_stride,
    epsilon,
    offset,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Program (NUM_ROWS rows)."""
    row = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    column = tl.arange(0, WIDTH)
    is_column = column < SIZE
    mask = (row < num_rows)[:, None] & is_column[None, :]
    values = tl.load(rows + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if IS_CENTERED:
        mean = tl.sum(values, 1) / SIZE
        values = tl.where(is_column[None, :], values - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / SIZE + epsilon)
    values = values * scale[:, None]
    if ROUNDS_FIRST:
        values = rounded(values, output.dtype.element_ty).to(tl.float32)
    values *= (tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32) + offset)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    place = output + row[:, None] * SIZE + column[None, :]
    tl.store(place, rounded(values, output.dtype.element_ty), mask=mask)

"""Linear layers with quantized weights, natively where that can be had: a few tokens multiply codes as they are read
from memory, more of them a float32 matrix that is made piece by piece.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.kernels.quantized_weight import QuantizedWeight, dequantize
from shardwright.weight_format import BLOCK

MAX_TOKENS = 16
"""Most tokens for which the kernel multiplies: more keep torch's matrix products busy."""

PIECE_ELEMENTS = 1 << 20
"""4 MiB of float32: weights are widened in pieces of whole rows of about this size, which stay in the CPU's cache."""

_KINDS = {torch.int8: "int8", torch.uint8: "int4"}
_NUMBERS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def has_kernel(weight: QuantizedWeight) -> bool:
    """Whether there is a native kernel for a weight: on the CPU, in groups of whole blocks, and a compiler at hand."""
    is_served = weight.codes.device.type == "cpu" and weight.group_size % BLOCK == 0
    return is_served and native_library("quantized") is not None


def quantized_linear(
    input: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """As `quantized_linear_reference`, up to the order of sums."""
    if not has_kernel(weight):
        return quantized_linear_reference(input, weight, bias, compute_dtype=compute_dtype)
    if len(input) > MAX_TOKENS or input.dtype not in _NUMBERS:
        return _multiply(input, weight, bias, compute_dtype, _widened)
    wide = input.float()
    padding = -weight.inputs % BLOCK
    wide = F.pad(wide, (0, padding)) if padding else wide.contiguous()
    bias = None if bias is None else bias.to(input.dtype).contiguous()
    output = torch.empty(len(input), weight.outputs, dtype=input.dtype)
    _call(
        f"linear_{_KINDS[weight.codes.dtype]}_{_NUMBERS[input.dtype]}",
        weight,
        ctypes.c_void_p(wide.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_int64(len(input)),
        ctypes.c_int64(weight.outputs),
    )
    return output


def quantized_linear_reference(
    input: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`input @ weight.T + bias`, in torch.

    Args:
        input: [tokens, inputs], floating point.
        weight: on the device of `input`.
        bias: [outputs], or None.
        compute_dtype: of the product, for which weights are rounded to it.

    Returns: [tokens, outputs], dtype of `input`.
    """
    return _multiply(input, weight, bias, compute_dtype, dequantize)


def _multiply(
    input: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    rows: Callable[[QuantizedWeight, int, int], Tensor],
) -> Tensor:
    """The product, with a few rows of the matrix at once."""
    output = input.new_empty(len(input), weight.outputs)
    wide = input.to(compute_dtype)
    step = max(1, PIECE_ELEMENTS // max(1, weight.inputs))
    for first in range(0, weight.outputs, step):
        last = min(first + step, weight.outputs)
        piece = wide @ rows(weight, first, last).to(compute_dtype).T
        if bias is not None:
            piece += bias[first:last]
        output[:, first:last] = piece
    return output


def _widened(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """As `dequantize`, natively."""
    matrix = torch.empty(last - first, -(-weight.inputs // BLOCK) * BLOCK)
    out = ctypes.c_void_p(matrix.data_ptr())
    _call(f"matrix_{_KINDS[weight.codes.dtype]}", weight, out, ctypes.c_int64(first), ctypes.c_int64(last))
    return matrix[:, : weight.inputs]


def _call(name: str, weight: QuantizedWeight, *arguments: Any) -> None:
    """Call a function of the kernel with what all of them are told of a weight."""
    getattr(native_library("quantized"), name)(
        ctypes.c_void_p(weight.codes.data_ptr()),
        ctypes.c_void_p(weight.scales.data_ptr()),
        ctypes.c_void_p(None if weight.minimums is None else weight.minimums.data_ptr()),
        ctypes.c_int64(-(-weight.inputs // BLOCK)),
        ctypes.c_int64(weight.group_size // BLOCK),
        ctypes.c_int64(weight.scales.shape[1]),
        *arguments,
    )

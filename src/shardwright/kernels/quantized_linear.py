"""Linear layers with quantized weights in pure torch, on any device: the matrix is made piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.kernels.quantized_weight import QuantizedWeight, dequantize

PIECE_ELEMENTS = 1 << 20
"""4 MiB of float32: weights are widened in pieces of whole rows of about this size, which stay in the CPU's cache."""


def quantized_linear(
    input: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`input @ weight.T + bias`.

    Args:
        input: [tokens, inputs], floating point.
        weight: on the device of `input`.
        bias: [outputs], or None.
        compute_dtype: of the product, for which weights are rounded to it.

    Returns: [tokens, outputs], dtype of `input`.
    """
    output = input.new_empty(len(input), weight.outputs)
    wide = input.to(compute_dtype)
    step = max(1, PIECE_ELEMENTS // max(1, weight.inputs))
    for first in range(0, weight.outputs, step):
        last = min(first + step, weight.outputs)
        piece = wide @ dequantize(weight, first, last).to(compute_dtype).T
        if bias is not None:
            piece += bias[first:last]
        output[:, first:last] = piece
    return output

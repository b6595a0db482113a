"""Weights of linears as codes of a few bits with scales: made of a matrix, and made a matrix again.

    codes of 8 bits    [outputs, blocks * 32] int8
    codes of 4 bits    [outputs, blocks * 16] uint8: byte i of a block holds input i low, input i + 16 high

Rows are filled up to whole blocks with codes that are never used. `weight_format` says what codes mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.weight_format import BLOCK, WeightFormat

CHUNK_ELEMENTS = 1 << 22
"""A matrix is quantized in pieces of whole rows of about this size: 16 MiB of float32."""


class QuantizedWeight(NamedTuple):
    """The matrix of a linear."""

    codes: Tensor
    """[outputs, bytes], int8 or uint8, contiguous, as above."""
    scales: Tensor
    """[outputs, groups], bfloat16, contiguous."""
    minimums: Tensor | None
    """[outputs, groups], bfloat16, contiguous; None in 8 bits."""
    inputs: int
    group_size: int

    @property
    def outputs(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same elsewhere."""
        minimums = None if self.minimums is None else self.minimums.to(device)
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device), minimums=minimums)


@torch.no_grad()
def quantize(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Round a matrix to codes, each group on its own: a part that begins and ends between groups gets the same codes.

    Args:
        weight: [outputs, inputs], floating point, on any device.
        format: of the result.
    """
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    pieces = [_quantized(piece, format) for piece in weight.split(step)]
    codes, scales, minimums = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return QuantizedWeight(codes, scales, minimums if format.has_minimums else None, weight.shape[1], format.group_size)


def dequantize(weight: QuantizedWeight, first: int = 0, last: int | None = None) -> Tensor:
    """Rows of the matrix that codes stand for: [last - first, inputs], float32. Each value is rounded once or twice."""
    values = numbers(weight, first, last)
    group = torch.arange(weight.inputs, device=values.device) // weight.group_size
    matrix = values.float() * weight.scales[first:last].float()[:, group]
    if weight.minimums is not None:
        matrix += weight.minimums[first:last].float()[:, group]
    return matrix


def numbers(weight: QuantizedWeight, first: int = 0, last: int | None = None) -> Tensor:
    """Codes of some rows, a number each: [last - first, inputs], int8 of 8 bits and uint8 of 4."""
    codes = weight.codes[first:last]
    return _unpacked(codes)[:, : weight.inputs] if codes.dtype is torch.uint8 else codes[:, : weight.inputs]


def from_numbers(codes: Tensor, scales: Tensor, minimums: Tensor | None, *, group_size: int) -> QuantizedWeight:
    """The weight whose codes are a byte each, [outputs, inputs] uint8, whatever their sign."""
    inputs = codes.shape[1]
    codes = F.pad(codes, (0, -inputs % BLOCK))
    codes = codes.view(torch.int8) if minimums is None else _packed(codes)
    return QuantizedWeight(codes.contiguous(), scales.contiguous(), minimums, inputs, group_size)


def _quantized(weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minimums of a few rows."""
    outputs, inputs = weight.shape
    groups = format.num_groups(inputs)
    missing = groups * format.group_size - inputs
    wide = weight.float()
    if missing:  # repeats a value of the last group, which changes neither its least nor its greatest
        wide = torch.cat((wide, wide[:, -1:].expand(outputs, missing)), dim=1)
    grouped = wide.reshape(outputs, groups, format.group_size)
    if format.has_minimums:
        minimums = grouped.amin(-1).bfloat16()
        scales = ((grouped.amax(-1) - minimums.float()).clamp_min(0) / 15).bfloat16()
        low, high = 0, 15
        grouped = grouped - minimums.float()[..., None]
    else:
        scales = (grouped.abs().amax(-1) / 127).bfloat16()
        minimums = torch.zeros_like(scales)
        low, high = -127, 127
    steps = torch.where(scales > 0, scales.float(), 1.0)
    codes = (grouped / steps[..., None]).round_().clamp_(low, high).reshape(outputs, -1)[:, :inputs]
    codes = F.pad(codes, (0, -inputs % BLOCK))
    return (_packed(codes.byte()) if format.bits == 4 else codes.char()), scales, minimums


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte: [outputs, inputs] to [outputs, inputs / 2]."""
    low, high = codes.view(len(codes), -1, 2, BLOCK // 2).unbind(2)
    return (low | high << 4).reshape(len(codes), -1)


def _unpacked(codes: Tensor) -> Tensor:
    """[outputs, bytes] to [outputs, 2 * bytes]."""
    outputs, num_bytes = codes.shape
    blocks = codes.view(outputs, num_bytes // (BLOCK // 2), BLOCK // 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=2).view(outputs, 2 * num_bytes)

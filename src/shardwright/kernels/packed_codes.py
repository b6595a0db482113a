"""Linears with quantized weights whose codes are packed as weights are (native/packed_codes.h).

A panel has PANEL output features, and is a list of groups, each with its codes, scales and in 4 bits minimums. Codes
lie in rows of 2 * PANEL bytes, for 2 input features of 8 bits or 4 of 4 bits; groups are filled up to a multiple of 4
input features. Of 8 bits, byte 4i + 2k of a row has input feature k of output feature i, and the byte after it that of
output feature i + PANEL / 2; of 4 bits, byte 4i + k has both, the former low. Scales and minimums are packed as
bfloat16 weights are.

Inputs are rounded, with a scale for each group of a token: to 16 bits, or those of bfloat16 beside codes of 4 bits to 8
bits, which are as many as they have. Sums of products within a group are then exact, and meet the scales in float32.
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.kernels.packed_linear import LIBRARY, pack_weight, panel_features, unpack_weight
from shardwright.kernels.quantized_weight import QuantizedWeight, dequantize, from_numbers, numbers

_HALF = torch.bfloat16
UNIT = 4
"""Groups are filled up to a multiple of so many input features."""
LARGEST_BYTE, LARGEST_WORD, LARGEST_SUM = 2**7 - 1, 2**15 - 1, 2**31 - 1
LARGEST_CODE = 127

LIBRARY.define("coded_linear(Tensor input, Tensor panels, Tensor? bias, int outer, int group_size, int bits) -> Tensor")


class PackedCodes(NamedTuple):
    """The matrix of a linear."""

    panels: Tensor
    """[bytes] uint8."""
    outputs: int
    inputs: int
    group_size: int
    bits: Literal[8, 4]
    """Of a code."""

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return self.panels.nbytes


def pack_codes(weight: QuantizedWeight) -> PackedCodes:
    """Pack a weight that is on the CPU; `packed_linear.is_available` comes first."""
    panel, size = panel_features(), weight.group_size
    panels, is_small = -(-weight.outputs // panel), weight.minimums is not None
    values = F.pad(numbers(weight).view(torch.uint8), (0, 0, 0, -weight.outputs % panel))  # bytes, whatever their sign
    parts = []
    for group, first in enumerate(range(0, weight.inputs, size)):
        codes = values[:, first : first + size]
        codes = F.pad(codes, (0, -codes.shape[1] % UNIT)).view(panels, 2, panel // 2, -1, 4 if is_small else 2)
        first_half, second_half = codes.movedim(3, 1).unbind(2)  # [panels, rows, PANEL / 2, input features]
        rows = first_half | second_half << 4 if is_small else torch.stack((first_half, second_half), dim=-1)
        parts.append(rows.reshape(panels, -1))
        for part in (weight.scales, weight.minimums):
            if part is not None:
                parts.append(pack_weight(part[:, group, None]).view(torch.uint8).view(panels, -1))
    return PackedCodes(torch.cat(parts, dim=1).view(-1), weight.outputs, weight.inputs, size, 4 if is_small else 8)


def unpack_codes(packed: PackedCodes) -> QuantizedWeight:
    """The weight as it was."""
    panel, outputs = panel_features(), packed.outputs
    rest = packed.panels.view(-(-outputs // panel), -1)
    values: list[Tensor] = []
    scales: list[Tensor] = []
    minimums: list[Tensor] = []
    for first in range(0, packed.inputs, packed.group_size):
        count = min(packed.group_size, packed.inputs - first)
        num_bytes = -(-count // UNIT) * UNIT * panel * packed.bits // 8
        rows, rest = rest[:, :num_bytes].reshape(len(rest), -1, panel // 2, 4), rest[:, num_bytes:]
        if packed.bits == 4:
            halves = torch.stack((rows & 15, rows >> 4), dim=2)  # [panels, rows, 2, PANEL / 2, input features]
        else:
            halves = rows.unflatten(3, (2, 2)).movedim(4, 2)
        values.append(halves.movedim(1, 3).flatten(3).flatten(0, 2)[:outputs, :count])
        for found in (scales, minimums) if packed.bits == 4 else (scales,):
            part, rest = rest[:, : panel * 2].contiguous().view(_HALF), rest[:, panel * 2 :]
            found.append(unpack_weight(part.reshape(-1), outputs, 1))
    return from_numbers(
        torch.cat(values, dim=1),
        torch.cat(scales, dim=1),
        torch.cat(minimums, dim=1) if minimums else None,
        group_size=packed.group_size,
    )


def coded_linear(input: Tensor, weight: PackedCodes, bias: Tensor | None) -> Tensor:
    """`input @ weight.T + bias` of rounded inputs, with sums of groups in float32, rounded once.

    Args:
        input: [tokens, inputs] float32, bfloat16 or float16, on the CPU.
        weight: packed.
        bias: [outputs] float32, contiguous, or None.

    Returns: [tokens, outputs], dtype of the input. What is not finite makes all of a token's outputs not a number.
    """
    output: Tensor = torch.ops.shardwright.coded_linear.default(
        input, weight.panels, bias, weight.outputs, weight.group_size, weight.bits
    )
    return output


def coded_linear_reference(input: Tensor, weight: PackedCodes, bias: Tensor | None) -> Tensor:
    """What coded_linear computes, in torch."""
    output = (
        _rounded(input.float(), weight.group_size, 8 if weight.bits == 4 and input.dtype is _HALF else 16)
        @ dequantize(unpack_codes(weight)).T
    )
    if bias is not None:
        output += bias
    return output.to(input.dtype)


def _rounded(input: Tensor, group_size: int, bits: int) -> Tensor:
    """Inputs as integers of so many bits with a scale for each group can say them."""
    most = float(min(LARGEST_WORD, LARGEST_SUM // (LARGEST_CODE * group_size)) if bits == 16 else LARGEST_BYTE)
    rounded = []
    for group in input.split(group_size, dim=1):
        largest = group.abs().amax(1, keepdim=True)
        factor = torch.full_like(largest, most) / largest  # a number divided by a tensor is rounded twice
        rounded.append((group * torch.where(factor.isinf(), 0, factor)).round() * (largest / most))
    return torch.cat(rounded, dim=1)


def _coded_linear(input: Tensor, panels: Tensor, bias: Tensor | None, outer: int, group_size: int, bits: int) -> Tensor:
    if input.dtype not in (torch.float32, _HALF):
        return _coded_linear(input.float(), panels, bias, outer, group_size, bits).to(input.dtype)
    library = native_library()
    assert library is not None, "is_available comes first"
    input = input.contiguous()
    output = input.new_empty(len(input), outer)
    library.packed_linear(
        *map(ctypes.c_int64, (bits, group_size, input.dtype is _HALF)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (input, panels)),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_void_p(output.data_ptr()),
        *map(ctypes.c_int64, (*input.shape, outer)),
    )
    return output


def _shape_alone(input: Tensor, panels: Tensor, bias: Tensor | None, outer: int, *others: int) -> Tensor:
    return input.new_empty(len(input), outer)


LIBRARY.impl("coded_linear", _coded_linear, "CPU")
LIBRARY.impl("coded_linear", _shape_alone, "Meta")

"""Linears with quantized weights whose codes are packed as weights are (native/packed_codes.h).

A panel has the codes of PANEL output features, [inputs, PANEL] int8 or [inputs, PANEL / 2] uint8, a byte of which holds
the code of feature i low and that of feature i + PANEL / 2 high. Scales and minimums are packed as bfloat16 weights of
[outputs, groups].
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.kernels.jit import native_library
from shardwright.kernels.packed_linear import LIBRARY, pack_weight, panel_features, unpack_weight
from shardwright.kernels.quantized_weight import QuantizedWeight, dequantize, from_numbers, numbers

_HALF = torch.bfloat16

LIBRARY.define(
    "coded_linear(Tensor input, Tensor codes, Tensor scales, Tensor? minimums, Tensor? bias, int outer, "
    "int group_size, int bits) -> Tensor"
)


class PackedCodes(NamedTuple):
    """The matrix of a linear."""

    codes: Tensor
    """[bytes] uint8."""
    scales: Tensor
    """[numbers] bfloat16."""
    minimums: Tensor | None
    """[numbers] bfloat16; None in 8 bits."""
    outputs: int
    inputs: int
    group_size: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.minimums is None else 4

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)


def pack_codes(weight: QuantizedWeight) -> PackedCodes:
    """Pack a weight that is on the CPU; `packed_linear.is_available` comes first."""
    panel, outputs = panel_features(), weight.outputs
    values = F.pad(numbers(weight).view(torch.uint8), (0, 0, 0, -outputs % panel))  # as bytes, whatever their sign
    panels = values.view(-1, panel, weight.inputs).transpose(1, 2)
    if weight.minimums is not None:
        panels = panels[..., : panel // 2] | panels[..., panel // 2 :] << 4
    scales, minimums = (None if part is None else pack_weight(part) for part in (weight.scales, weight.minimums))
    assert scales is not None
    return PackedCodes(panels.reshape(-1), scales, minimums, outputs, weight.inputs, weight.group_size)


def unpack_codes(packed: PackedCodes) -> QuantizedWeight:
    """The weight as it was."""
    panels = packed.codes.view(-1, packed.inputs, panel_features() * packed.bits // 8)
    if packed.minimums is not None:
        panels = torch.cat((panels & 15, panels >> 4), dim=-1)
    values = panels.transpose(1, 2).reshape(-1, packed.inputs)[: packed.outputs]
    groups = -(-packed.inputs // packed.group_size)
    scales, minimums = (
        None if part is None else unpack_weight(part, packed.outputs, groups)
        for part in (packed.scales, packed.minimums)
    )
    assert scales is not None
    return from_numbers(values, scales, minimums, group_size=packed.group_size)


def coded_linear(input: Tensor, weight: PackedCodes, bias: Tensor | None) -> Tensor:
    """`input @ weight.T + bias` in float32, rounded once.

    Args:
        input: [tokens, inputs] float32, bfloat16 or float16, on the CPU.
        weight: packed.
        bias: [outputs] float32, contiguous, or None.

    Returns: [tokens, outputs], dtype of the input.
    """
    output: Tensor = torch.ops.shardwright.coded_linear.default(
        input, weight.codes, weight.scales, weight.minimums, bias, weight.outputs, weight.group_size, weight.bits
    )
    return output


def coded_linear_reference(input: Tensor, weight: PackedCodes, bias: Tensor | None) -> Tensor:
    """What coded_linear computes, in torch."""
    output = input.float() @ dequantize(unpack_codes(weight)).T
    if bias is not None:
        output += bias
    return output.to(input.dtype)


def _coded_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    minimums: Tensor | None,
    bias: Tensor | None,
    outer: int,
    group_size: int,
    bits: int,
) -> Tensor:
    if input.dtype not in (torch.float32, _HALF):
        return _coded_linear(input.float(), codes, scales, minimums, bias, outer, group_size, bits).to(input.dtype)
    library = native_library("packed")
    assert library is not None, "is_available comes first"
    input = input.contiguous()
    output = input.new_empty(len(input), outer)
    library.coded_linear(
        ctypes.c_int64(bits),
        ctypes.c_int64(input.dtype is _HALF),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (input, codes, scales)),
        ctypes.c_void_p(None if minimums is None else minimums.data_ptr()),
        ctypes.c_int64(group_size),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_void_p(output.data_ptr()),
        *map(ctypes.c_int64, (*input.shape, outer)),
    )
    return output


def _shape_alone(input: Tensor, codes: Tensor, scales: Tensor, minimums: Tensor | None, *others: object) -> Tensor:
    outer = others[1]
    assert isinstance(outer, int)
    return input.new_empty(len(input), outer)


LIBRARY.impl("coded_linear", _coded_linear, "CPU")
LIBRARY.impl("coded_linear", _shape_alone, "Meta")

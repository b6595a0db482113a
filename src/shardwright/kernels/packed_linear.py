"""Linears with packed weights, natively: read in order at the speed of memory for a few tokens, multiplied at the rate
of the cores for many. Half-precision weights are widened in registers; sums are float32, rounded once.

A packed weight is one tensor of panels (native/packed.h), of the weight's type, or float32 for a float16 one.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from shardwright.kernels.jit import native_library

_HALF = torch.bfloat16
PACKED_TYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""Types of weights that can be packed, and what they become."""

LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
"""Our operators, which PyTorch's modes see."""
LIBRARY.define("packed_linear(Tensor input, Tensor packed, Tensor? bias, int outer) -> Tensor")


def is_available() -> bool:
    """Whether the kernel is compiled, or can be now."""
    return native_library("packed") is not None


def packed_elements(outer: int, inner: int) -> int:
    """Numbers in a packed weight of [outer, inner]: whole panels."""
    return -(-outer // panel_features()) * panel_features() * inner


def pack_weight(weight: Tensor, into: Tensor | None = None) -> Tensor:
    """Pack a weight.

    Args:
        weight: [outer, inner] of one of PACKED_TYPES, of any strides, on the CPU.
        into: [packed_elements(outer, inner)] of the type that it becomes, contiguous; made if None.

    Returns: `into`.
    """
    outer, inner = weight.shape
    weight = weight.detach().to(PACKED_TYPES[weight.dtype])
    if into is None:
        into = torch.empty(packed_elements(outer, inner), dtype=weight.dtype)
    assert into.dtype is weight.dtype
    assert len(into) == packed_elements(outer, inner)
    library = native_library("packed")
    assert library is not None, "is_available comes first"
    library.pack_weight(
        ctypes.c_int64(weight.dtype is _HALF),
        ctypes.c_void_p(weight.data_ptr()),
        *map(ctypes.c_int64, (*weight.stride(), outer, inner)),
        ctypes.c_void_p(into.data_ptr()),
    )
    return into


def unpack_weight(packed: Tensor, outer: int, inner: int) -> Tensor:
    """The weight as it was: [outer, inner]."""
    panel = panel_features()
    panels = packed.view(-1, inner, panel)
    if packed.dtype is _HALF:  # the first half of a panel's features at even places, as native/packed.h says
        panels = torch.cat((panels[..., ::2], panels[..., 1::2]), dim=-1)
    return panels.transpose(1, 2).reshape(-1, inner)[:outer]


def packed_linear(input: Tensor, packed: Tensor, bias: Tensor | None, outer: int) -> Tensor:
    """`input @ weight.T + bias` in float32, rounded once.

    Args:
        input: [tokens, inner] float32, bfloat16 or float16.
        packed: the weight, from `pack_weight`.
        bias: [outer] float32, contiguous, or None.
        outer: number of output features.

    Returns: [tokens, outer], dtype of the input.
    """
    output: Tensor = PACKED_LINEAR(input, packed, bias, outer)
    return output


def packed_linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What packed_linear computes of the weight as it was, in torch."""
    output = input.float() @ weight.float().T
    if bias is not None:
        output += bias.float()
    return output.to(input.dtype)


def multiply_packed(input: Tensor, packed: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """As `packed_linear`, with the output, [tokens, outer], contiguous, written where it shall be.

    Raises: ValueError if the packed weight or the bias is not of its shape or type.
    """
    tokens, inner = input.shape
    outer = output.shape[1]
    if len(packed) != packed_elements(outer, inner) or (bias is not None and bias.dtype is not torch.float32):
        raise ValueError(f"no packed weight of {outer} x {inner} has {len(packed)} numbers, or its bias is not float32")
    if input.dtype not in (torch.float32, _HALF):
        output.copy_(_packed_linear(input.float(), packed, bias, outer))
        return
    library = native_library("packed")
    assert library is not None, "is_available comes first"
    input = input.contiguous()
    library.packed_linear(
        ctypes.c_int64(packed.dtype is _HALF),
        ctypes.c_int64(input.dtype is _HALF),
        ctypes.c_void_p(input.data_ptr()),
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else None),
        ctypes.c_void_p(output.data_ptr()),
        *map(ctypes.c_int64, (tokens, inner, outer)),
    )


def _packed_linear(input: Tensor, packed: Tensor, bias: Tensor | None, outer: int) -> Tensor:
    output = input.new_empty(len(input), outer)
    multiply_packed(input, packed, bias, output)
    return output


def _shape_alone(input: Tensor, packed: Tensor, bias: Tensor | None, outer: int) -> Tensor:
    return input.new_empty(len(input), outer)


LIBRARY.impl("packed_linear", _packed_linear, "CPU")
LIBRARY.impl("packed_linear", _shape_alone, "Meta")
PACKED_LINEAR = torch.ops.shardwright.packed_linear.default
"""What modes that watch operators see."""


@cache
def panel_features() -> int:
    """Output features of a panel on this machine."""
    library = native_library("packed")
    assert library is not None, "is_available comes first"
    library.panel_features.restype = ctypes.c_int64
    return int(library.panel_features())

"""Linears with packed weights, natively: read in order at the speed of memory for a few tokens, multiplied at the rate
of the cores for many. Half-precision weights are widened in registers; sums are float32, rounded once.

A packed weight is one tensor of panels (native/packed.h), of the weight's type, or float32 for a float16 one. Those of
bfloat16 are kept in 12 bits, without loss, where their exponents lie close together as trained ones do
(native/compact.h): then it is a tensor of bytes. Fewer bytes are read for a token, and there are fewer of them.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from shardwright.kernels.huge_pages import empty_in_huge_pages
from shardwright.kernels.jit import native_library

_HALF, _COMPACT = torch.bfloat16, torch.uint8
_BITS = {torch.float32: 32, _HALF: 16, _COMPACT: 12}
_GROUP = 4
"""Input features of a compact weight come in such groups."""
PACKED_TYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""Types of weights that can be packed, and what they become."""

LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
"""Our operators, which PyTorch's modes see."""
LIBRARY.define("packed_linear(Tensor input, Tensor packed, Tensor? bias, int outer) -> Tensor")


def is_available() -> bool:
    """Whether the kernel is compiled, or can be now."""
    return native_library() is not None


def packed_elements(outer: int, inner: int) -> int:
    """Numbers in a packed weight of [outer, inner]: whole panels."""
    return -(-outer // panel_features()) * panel_features() * inner


def compact_bytes(weight: Tensor) -> int | None:
    """Bytes that a weight [outer, inner] of PACKED_TYPES takes if it fits in 12 bits; None if it cannot."""
    outer, inner = weight.shape
    return None if weight.dtype is not _HALF else _compact_bytes(outer, inner)


def _compact_bytes(outer: int, inner: int) -> int | None:
    if inner == 0 or inner % _GROUP:
        return None
    library = _library()
    library.compact_bytes.restype = ctypes.c_int64
    return int(library.compact_bytes(ctypes.c_int64(outer), ctypes.c_int64(inner)))


def pack_weight(weight: Tensor, into: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    """Pack a weight.

    Args:
        weight: [outer, inner] of one of PACKED_TYPES, of any strides, on the CPU.
        into: contiguous, [packed_elements(outer, inner)] of the type that it becomes, or [compact_bytes(weight)] uint8;
            made if None.
        unpacked: [packed_elements(outer, inner)] of the type that it becomes, for a weight that does not fit in 12
            bits; made if None.

    Returns: `into`; `unpacked` if the weight does not fit.
    """
    outer, inner = weight.shape
    weight = weight.detach().to(PACKED_TYPES[weight.dtype])
    if into is None:
        size = compact_bytes(weight)
        into = torch.empty(size or packed_elements(outer, inner), dtype=_COMPACT if size else weight.dtype)
    library, is_compact = _library(), into.dtype is _COMPACT
    assert is_compact or into.dtype is weight.dtype
    assert len(into) == (compact_bytes(weight) if is_compact else packed_elements(outer, inner))
    layout = [ctypes.c_int64(number) for number in (*weight.stride(), outer, inner)]
    source, to = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(into.data_ptr())
    if not is_compact:
        library.pack_weight(ctypes.c_int64(weight.dtype is _HALF), source, *layout, to)
    elif not library.pack_compact(source, *layout, to):
        if unpacked is None:
            unpacked = empty_in_huge_pages(packed_elements(outer, inner) * weight.itemsize).view(_HALF)
        return pack_weight(weight, unpacked)
    return into


def keep_unpacked(packed: Tensor, unpacked: Tensor, outer: int, inner: int) -> None:
    """Keep a weight in 12 bits in 16 too, where batches and prompts read it from then on.

    It takes one thread, runs beside Python, and the weight may be multiplied meanwhile.

    Args:
        packed: the weight [outer, inner], in 12 bits.
        unpacked: [packed_elements(outer, inner)] bfloat16, in the same piece of memory, which lasts as long.
    """
    assert packed.untyped_storage().data_ptr() == unpacked.untyped_storage().data_ptr()
    assert len(unpacked) == packed_elements(outer, inner)
    sizes = (outer, inner, unpacked.data_ptr() - packed.data_ptr())
    _library().keep_unpacked(ctypes.c_void_p(packed.data_ptr()), *map(ctypes.c_int64, sizes))


def unpack_weight(packed: Tensor, outer: int, inner: int) -> Tensor:
    """The weight as it was: [outer, inner]."""
    panel = panel_features()
    panels = _unpacked_panels(packed, outer, inner) if packed.dtype is _COMPACT else packed.view(-1, inner, panel)
    is_half = panels.dtype is _HALF
    if is_half:  # the first half of a panel's features at even places, as native/packed.h says
        panels = torch.cat((panels[..., ::2], panels[..., 1::2]), dim=-1)
    return panels.transpose(1, 2).reshape(-1, inner)[:outer]


def _unpacked_panels(packed: Tensor, outer: int, inner: int) -> Tensor:
    """Panels [panels, inner, PANEL] of bfloat16 of a compact weight."""
    panel = panel_features()
    panels = -(-outer // panel)
    table_bytes, group_bytes = 2 * panel, _GROUP * panel * 3 // 2
    end = panels * (table_bytes + inner // _GROUP * group_bytes)
    tables, groups = packed[:end].view(panels, -1).tensor_split([table_bytes], dim=1)
    low, codes = groups.reshape(panels, -1, group_bytes).tensor_split([4 * panel], dim=2)
    codes = torch.cat((codes & 15, codes >> 4), dim=2)
    high = tables.gather(1, codes.reshape(panels, -1).long()).view_as(low)
    lanes = torch.stack((low, high), dim=-1).view(panels, -1, 2, panel // 8, 2, 8, 2)  # rows of two, lanes, rows, words
    numbers = lanes.movedim(4, 3).reshape(panels, inner, panel, 2).view(_HALF).squeeze(-1).clone()
    starts, apart = packed[end + 8 :].tensor_split([8 * (panels + 1)])  # after how far away the unpacked one is
    starts, apart = starts.view(torch.int64), apart.view(-1, 8)
    places = apart[:, :4].contiguous().view(torch.int32).view(-1)[: starts[-1]].long()
    values = apart[:, 4:].contiguous().view(torch.float32).view(-1)[: starts[-1]]
    own, features = torch.arange(panels).repeat_interleave(starts.diff()), places % panel
    words = torch.where(features < panel // 2, 2 * features, 2 * (features - panel // 2) + 1)
    numbers[own, places // panel, words] = values.bfloat16()
    return numbers


def packed_linear(input: Tensor, packed: Tensor, bias: Tensor | None, outer: int) -> Tensor:
    """`input @ weight.T + bias` in float32, rounded once.

    Args:
        input: [tokens, inner] float32, bfloat16 or float16.
        packed: the weight, from `pack_weight`. In 12 bits, inputs that are not finite may make NaN of infinite outputs.
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
    library, bits = _library(), _BITS[packed.dtype]
    elements = _compact_bytes(outer, inner) if bits == 12 else packed_elements(outer, inner)
    if len(packed) != elements or (bias is not None and bias.dtype is not torch.float32):
        raise ValueError(f"no packed weight of {outer} x {inner} has {len(packed)} numbers, or its bias is not float32")
    if input.dtype not in (torch.float32, _HALF):
        output.copy_(_packed_linear(input.float(), packed, bias, outer))
        return
    input = input.contiguous()
    library.packed_linear(
        *map(ctypes.c_int64, (bits, 0, input.dtype is _HALF)),
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
    library = _library()
    library.panel_features.restype = ctypes.c_int64
    return int(library.panel_features())


def _library() -> ctypes.CDLL:
    library = native_library()
    assert library is not None, "is_available comes first"
    return library

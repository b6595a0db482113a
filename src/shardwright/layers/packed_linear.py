"""Linears on the CPU that multiply with packed weights (kernels/packed_linear.py).

The weight as it was stays where it is, for code that looks at it; of a checkpoint that is mapped from its file it takes
no memory that others could not have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.kernels.huge_pages import empty_in_huge_pages, release, reserve, reserved_bytes
from shardwright.kernels.packed_linear import (
    PACKED_LINEAR,
    PACKED_TYPES,
    compact_bytes,
    keep_unpacked,
    pack_weight,
    packed_elements,
    packed_linear,
)
from shardwright.layers.parallel import PARALLEL_LINEARS, combined
from shardwright.layers.upcast_linear import has_fast_half_products

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Of the memory available that packed weights may take."""
COMPACT_SHARE = 0.77
"""Of the bytes of bfloat16 weights that they take in 12 bits."""
UNPACKED_SHARE = 0.125
"""Of the memory available that they may take once more, unpacked."""
FEW_TOKENS = 16
"""On CPUs with half-precision matrix products: up to so many tokens reading the weight is what takes time."""
ALIGNMENT = 64
_packing = Lock()
"""Held while a weight is packed or unpacked: another thread may be about to do the same."""
LINEAR_OPERATORS = (F.linear, PACKED_LINEAR)
"""What modes see of a linear, as it was and packed."""


class PackedLinear(nn.Linear):
    """nn.Linear with a packed weight beside its own."""

    packed: Tensor
    unpacked: Tensor | None
    """Room for the weight in 16 bits beside one in 12."""
    keeps: bool = False
    """Whether it is kept there."""
    wide_bias: Tensor | None
    """In float32."""
    packed_version: int
    """Of the weight, when it was packed."""
    most_tokens: int | None
    """More are left to torch; None: none are."""
    is_plain: bool = False
    """Whether it multiplies as nn.Linear does."""

    def pack(self) -> None:
        """Take the weight and bias as they are now."""
        with _packing:
            self.packed = pack_weight(self.weight, self.packed, self.unpacked)
        if self.keeps:
            self.keep_unpacked()
        self.wide_bias = None if self.bias is None else self.bias.detach().float()
        self.packed_version = _version(self.weight)

    def keep_unpacked(self) -> None:
        """From now on keep the weight in 16 bits too, if it is packed in 12 and there is room."""
        with _packing:
            self.keeps = True
            if self.unpacked is not None and self.packed.dtype is torch.uint8:
                keep_unpacked(self.packed, self.unpacked, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], dtype of the input."""
        is_long = self.most_tokens is not None and input.numel() > self.most_tokens * self.in_features
        if self.is_plain or is_long:
            return super().forward(input)
        if _version(self.weight) != self.packed_version:  # RWKV's code scales its weights when it is first run
            self.pack()
        rows = input.reshape(math.prod(input.shape[:-1]), self.in_features)
        output = packed_linear(rows, self.packed, self.wide_bias, self.out_features)
        return output.view(*input.shape[:-1], self.out_features)


def pack_linears(module: nn.Module) -> int:
    """Turn the plain linears of a module on the CPU into PackedLinear, in place. Returns how many.

    Subclasses but our own are left alone: their forward may do something else. So are all, with a warning, if memory
    for their packed weights is short.
    """
    plain = (nn.Linear, *PARALLEL_LINEARS)
    linears: list[Any] = [m for m in module.modules() if type(m) in plain and m.weight.dtype in PACKED_TYPES]
    linears = [linear for linear in linears if linear.weight.ndim == 2]  # those of other pipeline stages are empty
    room = room_for_packed([linear.weight for linear in linears], keeps=True)
    if room is None:
        return 0
    for linear, own in zip(linears, room, strict=True):
        linear.__class__ = PackedLinear if type(linear) is nn.Linear else combined((type(linear), PackedLinear))
        assert isinstance(linear, PackedLinear)
        linear.packed, linear.unpacked = own
        linear.pack()
        linear.most_tokens = most_packed_tokens(linear.weight.dtype)
    return len(linears)


@contextmanager
def memory_ahead(num_bytes: int) -> Iterator[None]:
    """While open, memory to pack so many bytes of weights to is made ready in the background, if there is as much."""
    if num_bytes <= MEMORY_SHARE * psutil.virtual_memory().available:
        reserve(int(num_bytes * COMPACT_SHARE), room=2 * num_bytes)
    try:
        yield
    finally:
        release()


class Room(NamedTuple):
    """Memory for a packed weight, and if it is packed in 12 bits for one in 16, as far as there is as much."""

    packed: Tensor
    unpacked: Tensor | None


def room_for_packed(weights: Sequence[Tensor], *, keeps: bool) -> list[Room] | None:
    """Where weights [outer, inner] are packed to, side by side in huge pages; None, with a warning, if memory is short.

    Args:
        weights: each of one of PACKED_TYPES.
        keeps: whether there shall be room to keep them unpacked too.
    """
    types = [PACKED_TYPES[weight.dtype] for weight in weights]
    whole = [packed_elements(*weight.shape) * own.itemsize for weight, own in zip(weights, types, strict=True)]
    compact = [compact_bytes(weight) for weight in weights]
    sizes = [most if least is None else least for most, least in zip(whole, compact, strict=True)]
    starts = [0, *accumulate(_aligned(size) for size in sizes)]
    available = psutil.virtual_memory().available + reserved_bytes()
    if starts[-1] > MEMORY_SHARE * available:
        logger.warning("weights are not packed, which makes steps slower: it takes %.1f GiB", starts[-1] / 2**30)
        return None
    second = [
        0,
        *accumulate(0 if least is None else _aligned(most) for most, least in zip(whole, compact, strict=True)),
    ]
    keeps = keeps and second[-1] <= UNPACKED_SHARE * available
    memory = empty_in_huge_pages(starts[-1] + second[-1] * keeps, written=starts[-1])
    packed, unpacked = memory.tensor_split([starts[-1]])
    room = []
    for start, size, least, own, other, most in zip(starts, sizes, compact, types, second, whole, strict=False):
        if least is None:
            room.append(Room(packed[start : start + size].view(own), None))
        else:
            room.append(Room(packed[start : start + size], unpacked[other : other + most].view(own) if keeps else None))
    return room


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def most_packed_tokens(dtype: torch.dtype) -> int | None:
    """Up to how many tokens packed weights of a type are the faster ones; None: always."""
    return FEW_TOKENS if dtype is not torch.float32 and has_fast_half_products() else None


def _version(weight: Tensor) -> int:
    """Grows when a weight is changed in place; tensors made in inference mode do not tell."""
    return 0 if weight.is_inference() else weight._version

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
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.kernels.huge_pages import empty_in_huge_pages, release, reserve, reserved_bytes
from shardwright.kernels.packed_linear import PACKED_LINEAR, PACKED_TYPES, pack_weight, packed_elements, packed_linear
from shardwright.layers.parallel import PARALLEL_LINEARS, combined
from shardwright.layers.upcast_linear import has_fast_half_products

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Of the memory available that packed weights may take."""
FEW_TOKENS = 16
"""On CPUs with half-precision matrix products: up to so many tokens reading the weight is what takes time."""
ALIGNMENT = 64
LINEAR_OPERATORS = (F.linear, PACKED_LINEAR)
"""What modes see of a linear, as it was and packed."""


class PackedLinear(nn.Linear):
    """nn.Linear with a packed weight beside its own."""

    packed: Tensor
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
        pack_weight(self.weight, self.packed)
        self.wide_bias = None if self.bias is None else self.bias.detach().float()
        self.packed_version = _version(self.weight)

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
    room = room_for_packed([linear.weight for linear in linears])
    if room is None:
        return 0
    for linear, packed in zip(linears, room, strict=True):
        linear.__class__ = PackedLinear if type(linear) is nn.Linear else combined((type(linear), PackedLinear))
        assert isinstance(linear, PackedLinear)
        linear.packed = packed
        linear.pack()
        linear.most_tokens = most_packed_tokens(linear.weight.dtype)
    return len(linears)


@contextmanager
def memory_ahead(num_bytes: int) -> Iterator[None]:
    """While open, memory for packed weights is made ready in the background, if there may be as much."""
    if num_bytes <= MEMORY_SHARE * psutil.virtual_memory().available:
        reserve(num_bytes)
    try:
        yield
    finally:
        release()


def room_for_packed(weights: Sequence[Tensor]) -> list[Tensor] | None:
    """Where weights [outer, inner] are packed to, side by side in huge pages; None, with a warning, if memory is short.

    Args:
        weights: each of one of PACKED_TYPES.
    """
    types = [PACKED_TYPES[weight.dtype] for weight in weights]
    sizes = [packed_elements(*weight.shape) * t.itemsize for weight, t in zip(weights, types, strict=True)]
    starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    if starts[-1] > MEMORY_SHARE * (psutil.virtual_memory().available + reserved_bytes()):
        logger.warning("weights are not packed, which makes steps slower: it takes %.1f GiB", starts[-1] / 2**30)
        return None
    memory = empty_in_huge_pages(starts[-1])
    return [memory[s : s + size].view(t) for s, size, t in zip(starts, sizes, types, strict=False)]


def most_packed_tokens(dtype: torch.dtype) -> int | None:
    """Up to how many tokens packed weights of a type are the faster ones; None: always."""
    return FEW_TOKENS if dtype is not torch.float32 and has_fast_half_products() else None


def _version(weight: Tensor) -> int:
    """Grows when a weight is changed in place; tensors made in inference mode do not tell."""
    return 0 if weight.is_inference() else weight._version

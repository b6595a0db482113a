"""Half-precision linears on CPUs without half-precision matrix products.

There torch multiplies bfloat16 and float16 matrices element by element: measured on such a machine (AVX2, 2 cores), all
linears of a 135M model took 350 ms for 32 tokens, in float32 97 ms. So weights are widened to float32 on the way:
  * for one token by torch, which reads weights at the speed of memory;
  * for a few tokens by a native kernel, which reads each weight once and widens it in registers;
  * for many piece by piece, in a scratch buffer that stays in the cache of the CPU, for torch's float32 product.
Results are those of float32 accumulation, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.kernels.linear import MAX_TOKENS, is_available, linear_bf16
from shardwright.layers.parallel import PARALLEL_LINEARS, combined

MIN_TOKENS = 6
"""Without the native kernel: from this many tokens on widening pays; below, reading half the bytes does."""

SCRATCH_ELEMENTS = 1 << 20
"""4 MiB of float32: weights are widened in pieces of whole rows no larger than this, or of one row."""

_HALF = (torch.bfloat16, torch.float16)


class UpcastLinear(nn.Linear):
    """nn.Linear with half-precision weights that multiplies in float32."""

    scratch: Tensor
    """[SCRATCH_ELEMENTS] float32, shared by all linears of a model: they run one after another."""
    is_native: bool
    """Whether the native kernel takes its weights."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], dtype of the input."""
        rows = input.reshape(-1, self.in_features)
        if self.is_native and 1 < len(rows) <= MAX_TOKENS:
            output = linear_bf16(rows, self.weight, self.bias)
        elif len(rows) < MIN_TOKENS:
            output = F.linear(rows, self.weight, self.bias)
        else:
            output = self._multiply_widened(rows)
        return output.view(*input.shape[:-1], self.out_features)

    def _multiply_widened(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(len(rows), self.out_features)
        wide = rows.float()
        step = max(1, self.scratch.numel() // self.in_features)
        for start in range(0, self.out_features, step):
            weight = self.weight[start : start + step]
            wide_weight = self.scratch[: weight.numel()].view_as(weight).copy_(weight)
            piece = wide @ wide_weight.T
            if self.bias is not None:
                piece += self.bias[start : start + step]
            output[:, start : start + step] = piece
        return output


@cache
def has_fast_half_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least as fast as float32 ones."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def upcast_linears(module: nn.Module) -> int:
    """Turn the plain half-precision linears of a module into UpcastLinear, in place. Returns how many.

    Subclasses but our own are left alone: their forward may do something else.
    """
    plain = (nn.Linear, *PARALLEL_LINEARS)
    linears: list[Any] = [m for m in module.modules() if type(m) in plain and m.weight.dtype in _HALF]
    widest = max((linear.in_features for linear in linears), default=0)
    scratch = torch.empty(max(SCRATCH_ELEMENTS, widest))
    for linear in linears:
        linear.__class__ = UpcastLinear if type(linear) is nn.Linear else combined((type(linear), UpcastLinear))
        assert isinstance(linear, UpcastLinear)
        linear.scratch = scratch
        is_bf16 = linear.weight.dtype is torch.bfloat16 and linear.weight.is_contiguous()
        linear.is_native = is_bf16 and is_available()
    return len(linears)


@contextmanager
def plain_linears(module: nn.Module) -> Iterator[None]:
    """While open, products of few tokens are torch's own, for those who watch what torch does."""
    native = [held for held in module.modules() if isinstance(held, UpcastLinear) and held.is_native]
    for held in native:
        held.is_native = False
    try:
        yield
    finally:
        for held in native:
            held.is_native = True

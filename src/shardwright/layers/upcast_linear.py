"""Half-precision linears in pure torch, on CPUs without half-precision matrix products and machines without a compiler.

There torch multiplies bfloat16 and float16 matrices element by element: measured on such a machine (AVX2, 2 cores), all
linears of a 135M model took 350 ms for 32 tokens, in float32 97 ms; with AVX512-BF16 products have two thirds of the
rate of float32's. So weights are widened to float32 on the way: for many tokens piece by piece, in a scratch buffer
that stays in the cache of the CPU, for torch's float32 product. For a few tokens torch itself reads weights at the
speed of memory. Results are those of float32 accumulation, rounded once.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.layers.parallel import PARALLEL_LINEARS, combined

MIN_TOKENS = 6
"""From this many tokens on widening pays; below, reading half the bytes does."""

SCRATCH_ELEMENTS = 1 << 20
"""4 MiB of float32: weights are widened in pieces of whole rows no larger than this, or of one row."""

_HALF = (torch.bfloat16, torch.float16)


class UpcastLinear(nn.Linear):
    """nn.Linear with half-precision weights that multiplies in float32."""

    scratch: Tensor
    """[SCRATCH_ELEMENTS] float32, shared by all linears of a model: they run one after another."""
    is_plain: bool = False
    """Whether it multiplies as nn.Linear does."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], dtype of the input."""
        if self.is_plain:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        output = widened_linear(rows, self.weight, self.bias, self.scratch)
        return output.view(*input.shape[:-1], self.out_features)


def widened_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """The product of a linear with half-precision weights.

    Args:
        rows: [tokens, in].
        weight: [out, in].
        bias: [out], or None.
        scratch: [SCRATCH_ELEMENTS or more, at least in] float32, written over.

    Returns: [tokens, out], dtype of the rows.
    """
    if len(rows) < MIN_TOKENS:
        return F.linear(rows, weight, bias)
    outputs, inputs = weight.shape
    output = rows.new_empty(len(rows), outputs)
    wide = rows.float()
    step = max(1, scratch.numel() // inputs)
    for start in range(0, outputs, step):
        part = weight[start : start + step]
        wide_part = scratch[: part.numel()].view(part.shape).copy_(part)
        piece = wide @ wide_part.T
        if bias is not None:
            piece += bias[start : start + step]
        output[:, start : start + step] = piece
    return output


@cache
def has_fast_half_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least as fast as float32 ones.

    On x86 that takes AMX: AVX512-BF16 has an instruction for it, of half the rate of float32's (Emerald Rapids, 89
    against 179 GFLOP/s a core), and torch claims to be fast wherever there is AVX-512.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_amx_tile_supported())
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
    return len(linears)

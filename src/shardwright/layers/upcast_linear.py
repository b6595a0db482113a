"""Half-precision linears on CPUs without half-precision matrix products.

There torch multiplies bfloat16 and float16 matrices element by element: measured on such a machine (AVX2, 2 cores), all
linears of a 135M model took 350 ms for 32 tokens, in float32 97 ms. A single token is different: that is bound by
reading the weights, which are half the size. So from a few tokens on, weights are turned to float32 piece by piece in a
scratch buffer that stays in the cache of the CPU, and multiplied there. Results are those of float32 accumulation,
rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_TOKENS = 6
"""From this many tokens on converting pays; below, reading half the bytes does (measured, see above)."""

SCRATCH_ELEMENTS = 1 << 20
"""4 MiB of float32: weights are converted in pieces of whole rows no larger than this, or of one row."""

_HALF = (torch.bfloat16, torch.float16)


class UpcastLinear(nn.Linear):
    """nn.Linear with half-precision weights that multiplies in float32."""

    scratch: Tensor
    """[SCRATCH_ELEMENTS] float32, shared by all linears of a model: they run one after another."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], dtype of the input."""
        rows = input.reshape(-1, self.in_features)
        if len(rows) < MIN_TOKENS:
            return F.linear(input, self.weight, self.bias)
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
        return output.view(*input.shape[:-1], self.out_features)


def has_fast_half_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least as fast as float32 ones."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def upcast_linears(module: nn.Module) -> int:
    """Turn the plain half-precision linears of a module into UpcastLinear, in place. Returns how many.

    Subclasses are left alone: their forward may do something else.
    """
    linears = [m for m in module.modules() if type(m) is nn.Linear and m.weight.dtype in _HALF]
    widest = max((linear.in_features for linear in linears), default=0)
    scratch = torch.empty(max(SCRATCH_ELEMENTS, widest))
    for linear in linears:
        linear.__class__ = UpcastLinear
        assert isinstance(linear, UpcastLinear)
        linear.scratch = scratch
    return len(linears)

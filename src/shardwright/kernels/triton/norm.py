"""Norms over the last dimension on a GPU, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.kernels.norm import NormKind
from shardwright.kernels.triton.programs import norm as programs
from shardwright.kernels.triton.types import power_of_two

NUMBERS = 2048
"""Of one program, in as many rows as that makes, one at least."""

NUMBERS_OF_A_WARP = 512
MOST_WARPS = 16


def norm(rows: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Norm rows; as `kernels.norm.norm`, which is its reference.

    Args:
        rows: [..., N] of any strides.
        weight, bias: [N], contiguous.
        kind: of the norm.

    Returns: [..., N] contiguous, type of the rows.
    """
    size = rows.shape[-1]
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if not output.numel():
        return output
    rows = rows.reshape(-1, size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    width = power_of_two(size)
    num_rows = max(1, NUMBERS // width)
    programs.norm[(-(-len(rows) // num_rows),)](
        rows,
        weight,
        weight if bias is None else bias,
        output,
        len(rows),
        rows.stride(0),
        float(kind.epsilon),
        float(kind.offset),
        SIZE=size,
        WIDTH=width,
        NUM_ROWS=num_rows,
        IS_CENTERED=kind.is_centered,
        ROUNDS_FIRST=kind.rounds_first,
        HAS_BIAS=bias is not None,
        num_warps=min(MOST_WARPS, max(1, num_rows * width // NUMBERS_OF_A_WARP)),
    )
    return output

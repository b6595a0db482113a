"""Gated activations on a GPU, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.kernels.gated import Activation
from shardwright.kernels.triton.programs import gated as programs
from shardwright.kernels.triton.types import power_of_two

NUMBERS = 1024
"""Most that one program makes."""


def gated(both: Tensor, activation: Activation, *, is_gate_first: bool = True) -> Tensor:
    """Multiply one half of each row by the activation of the other; as `kernels.gated.gated`, which is its reference.

    Args:
        both: [..., 2 * N] of any strides.

    Returns: [..., N] contiguous, same type.
    """
    size = both.shape[-1] // 2
    output = torch.empty((*both.shape[:-1], size), dtype=both.dtype, device=both.device)
    if not output.numel():
        return output
    rows = both.reshape(-1, 2 * size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    width = min(power_of_two(size), NUMBERS)
    programs.gated[len(rows), -(-size // width)](
        rows,
        output,
        size,
        rows.stride(0),
        0 if is_gate_first else size,
        size if is_gate_first else 0,
        ACTIVATION=activation.value,
        WIDTH=width,
        num_warps=4,
    )
    return output

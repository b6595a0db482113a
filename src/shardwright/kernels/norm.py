"""Norms over the last dimension: what they compute, in plain PyTorch; kernels/triton/norm.py does it in one launch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class NormKind:
    """What a norm does with the numbers of a row, in float32."""

    is_centered: bool
    """Their mean is taken off first."""
    epsilon: float
    """Added to the mean of their squares."""
    offset: float
    """Added to the weight."""
    rounds_first: bool
    """They are rounded to the type of the row before they are weighted, and again after."""


def norm(rows: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Norm rows.

    Args:
        rows: [..., N], any floating type.
        weight: [N], any floating type.
        bias: [N], likewise.
        kind: of the norm.

    Returns: [..., N], type of the rows.
    """
    values = rows.float()
    if kind.is_centered:
        values = values - values.mean(-1, keepdim=True)
    values = values * (values.square().mean(-1, keepdim=True) + kind.epsilon).rsqrt()
    if kind.rounds_first:
        values = values.to(rows.dtype).float()
    values = values * (weight.float() + kind.offset)
    if bias is not None:
        values = values + bias.float()
    return values.to(rows.dtype)

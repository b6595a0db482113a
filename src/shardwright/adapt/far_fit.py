"""Whether what was understood of an attention in a short pass holds at far positions too, and what it is there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shardwright.adapt.bias import Bias, distances_from, read_bias
from shardwright.adapt.fit import FittedAttention
from shardwright.adapt.seen import read_far_visibility, seen_by_scores
from shardwright.errors import UnsupportedModelError

MISFIT = 1e-3
"""Largest difference, relative to the largest bias, between what is added near and far at the same distance."""


def far_rows(num_near: int, num_tokens: int, device: torch.device) -> Tensor:
    """Queries to look at in a pass of so many tokens, the first `num_near` of which are understood: [R] int64."""
    near = [0, 1, num_near // 2, num_near - 1, num_near]
    spread = torch.linspace(num_near, num_tokens - 1, 24).long().tolist()
    return torch.tensor(sorted({*near, *spread, num_tokens - 2, num_tokens - 1}), device=device)


def fit_far(near: FittedAttention, added: Tensor, rows: Tensor, *, num_near: int, precision: float) -> FittedAttention:
    """The attention as it is for far positions.

    Args:
        near: as it is for the first `num_near` positions.
        added: [H or 1, R, T], what the code adds to the scores of a few queries, or who sees whom (bool).
        rows: [R] int64, positions of these queries; the last one is T - 1.
        num_near: positions that are understood.
        precision: to which numbers may be rounded.

    Raises: UnsupportedModelError if it is another one there.
    """
    name, spec = near.spec.name, near.spec
    try:
        if added.dtype == torch.bool:
            return replace(
                near, spec=replace(spec, visibility=read_far_visibility(added, rows, spec.visibility, num_near))
            )
        length = int(rows[-1]) + 1
        scores = added[..., near.first_column : near.first_column + length].float().expand(spec.num_heads, -1, -1)
        if near.order is not None:
            scores = scores[near.order]
        distances = distances_from(rows, length)
        known = _from_own(near.bias, distances) if near.bias is not None else 0.0
        allowed = seen_by_scores(scores, rows, known)
        visibility = read_far_visibility(allowed, rows, spec.visibility, num_near)
        bias = read_bias(scores, allowed[0], rows, precision=precision)
        return replace(
            near, spec=replace(spec, visibility=visibility), bias=_agreed(near.bias, bias, num_near, MISFIT + precision)
        )
    except UnsupportedModelError as exc:
        raise UnsupportedModelError(f"{name}, in a pass of {int(rows[-1]) + 1:,} tokens: {exc}") from exc


def _from_own(bias: Bias, distances: Tensor) -> Tensor:
    return bias.at(distances) - bias.at(torch.zeros_like(distances[:1, :1]))


def _agreed(near: Bias | None, far: Bias | None, num_near: int, misfit: float) -> Bias | None:
    """The far bias, if it is the near one as far as that goes; and exactly that at a query's own position."""
    if near is None and far is None:
        return None
    if near is None or far is None:
        raise UnsupportedModelError("its bias depends on the number of tokens")
    reach = num_near if near.table_HN is None else near.table_HN.shape[1]
    distances = torch.arange(reach, device=near.slopes_H.device)[None]
    expected, actual = _from_own(near, distances), _from_own(far, distances)
    if bool(((expected - actual).abs() > misfit * expected.abs().max()).any()):
        raise UnsupportedModelError("its bias depends on the number of tokens")
    if far.table_HN is None:
        return far
    return replace(far, table_HN=far.table_HN + near.at(distances[:, :1])[:, 0])

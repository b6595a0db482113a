"""Who sees whom, from who did: full, sliding or chunked causal attention, read off masks."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.adapt.bias import own_column
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError

HIDDEN = -5e3
"""Scores from here down stand for positions that are not seen, however the code spells infinity; -10000 is common."""


def read_visibility(allowed_HTT: Tensor) -> Visibility:
    """Understand a mask. Raises UnsupportedModelError if it is of no kind that we know."""
    length = allowed_HTT.shape[-1]
    allowed = _of_all_heads(allowed_HTT)
    chunk = next((i for i in range(1, length) if not bool(allowed[i, 0])), length)
    width = int(allowed[-1].sum())
    candidates = [Visibility(), Visibility(VisibilityKind.SLIDING, width), Visibility(VisibilityKind.CHUNKED, chunk)]
    return _that_gives(allowed, torch.arange(length, device=allowed.device), candidates)


def read_far_visibility(allowed_HRT: Tensor, rows_R: Tensor, near: Visibility, num_near: int) -> Visibility:
    """Understand some rows of a mask.

    Args:
        allowed_HRT: [H, R, T] bool.
        rows_R: [R] int64, positions of these queries, the last one T - 1.
        near: what is right for the first positions,
        num_near: and for how many.

    Raises: UnsupportedModelError if it is of no kind that we know.
    """
    allowed = _of_all_heads(allowed_HRT)
    length = allowed.shape[-1]
    first = int(allowed[-1].int().argmax())
    chunks = {first // k for k in range(1, first // num_near + 1) if first % k == 0}
    candidates = [near, Visibility(), Visibility(VisibilityKind.SLIDING, length - first)]
    candidates += [Visibility(VisibilityKind.CHUNKED, size) for size in sorted(chunks)]
    known = range(num_near)
    agreeing = [c for c in candidates if all(c.first_visible(i) == near.first_visible(i) for i in known)]
    return _that_gives(allowed, rows_R, agreeing)


def seen_by_scores(scores_HRT: Tensor, rows_R: Tensor, bias_HRT: Tensor | float) -> Tensor:
    """Where a mask was not added to scores of nothing but mask and bias, `bias_HRT` being known: bool, as they are."""
    allowed: Tensor = scores_HRT - own_column(scores_HRT, rows_R) - bias_HRT > HIDDEN
    return allowed


def _of_all_heads(allowed_HRT: Tensor) -> Tensor:
    allowed: Tensor = allowed_HRT[0]
    if not bool((allowed_HRT == allowed).all()):
        raise UnsupportedModelError("its heads see different positions")
    return allowed


def _that_gives(allowed_RT: Tensor, rows_R: Tensor, candidates: list[Visibility]) -> Visibility:
    positions = torch.arange(allowed_RT.shape[-1], device=allowed_RT.device)
    is_past = positions <= rows_R[:, None]
    if bool((allowed_RT & ~is_past).any()):
        raise UnsupportedModelError("its attention is not causal")
    for candidate in candidates:
        first = torch.tensor([candidate.first_visible(i) for i in rows_R.tolist()], device=allowed_RT.device)
        if bool(((positions >= first[:, None]) & is_past == allowed_RT).all()):
            return candidate
    raise UnsupportedModelError("its mask is neither full, sliding nor chunked")

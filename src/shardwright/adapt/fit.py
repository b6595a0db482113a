"""From what an attention computed to what it means: scale, soft-cap, who sees whom, which heads are copies.

Everything is read off numbers of a real pass with the model's own weights, so it holds whatever the code looks like.
What does not fit is refused with a reason; what fits by accident is caught by the comparison of logits that follows
(worker/self_check.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.adapt.trace import AttentionTrace
from shardwright.attention.layout import AttentionParams
from shardwright.cache.spec import LayerSpec, Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError

TOLERANCE = 2e-3
"""Largest misfit of scores, relative to the largest score: float32 noise is far below, another formula far above."""

ROUNDINGS = 4
"""So many times a score may have been rounded to the type of queries and keys, on top of that."""

HIDDEN = -5e3
"""Scores from here down stand for positions that are not seen, however the code spells infinity; -10000 is common."""

CAP_ADVANTAGE = 4.0
"""So many times better a soft-cap must fit than none: one far above all scores fits as well as none."""

SOFT_CAPS = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0)
"""Caps to try where scores do not grow in proportion to the products."""


@dataclass(frozen=True, slots=True)
class FittedAttention:
    """One attention call, understood."""

    spec: LayerSpec
    params: AttentionParams
    repeats: int
    """Query heads that share a KV head which the code repeats: every `repeats`-th of its heads is kept."""


def fit_attention(trace: AttentionTrace, name: str) -> FittedAttention:
    """Understand one traced attention.

    Raises: UnsupportedModelError, with what does not fit.
    """
    if not trace.is_sdpa and trace.scores is None:
        raise UnsupportedModelError(f"{name}: its scores go through no softmax")
    if trace.value is None:
        raise UnsupportedModelError(f"{name}: its attention weights never meet values")
    query, key, value = trace.query.float(), trace.key.float(), trace.value.float()
    if key.shape[1] != query.shape[1] or value.shape[:2] != key.shape[:2] or query.shape[0] % key.shape[0]:
        raise UnsupportedModelError(
            f"{name}: queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} "
            "do not match"
        )
    if trace.is_sdpa:
        visibility, scale, softcap = _sdpa_visibility(trace, name), trace.options.get("scale"), None
        scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    else:
        visibility, scale, softcap = _fit_scores(trace, query, key, name)
    repeats = _repeats(key, value)
    return FittedAttention(
        LayerSpec(
            name=name,
            num_heads=query.shape[0],
            num_kv_heads=key.shape[0] // repeats,
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            visibility=visibility,
        ),
        AttentionParams(scale=scale, softcap=softcap),
        repeats,
    )


def _sdpa_visibility(trace: AttentionTrace, name: str) -> Visibility:
    mask = trace.options.get("attn_mask")
    if trace.options.get("is_causal"):
        return Visibility()
    if mask is None:
        raise UnsupportedModelError(f"{name}: its attention is not causal")
    length = trace.query.shape[1]
    rows = mask.detach().expand(*mask.shape[:-2], length, length).reshape(-1, length, length)
    allowed = rows if rows.dtype == torch.bool else rows > HIDDEN
    if rows.dtype != torch.bool and bool((rows[allowed] != 0).any()):
        raise UnsupportedModelError(f"{name}: it adds a bias to its attention scores")
    return _visibility(allowed, name)


def _fit_scores(trace: AttentionTrace, query: Tensor, key: Tensor, name: str) -> tuple[Visibility, float, float | None]:
    assert trace.scores is not None
    seen = trace.scores > HIDDEN
    visibility = _visibility(seen, name)
    products = (query @ key.transpose(1, 2))[seen]
    scores = trace.scores.float()[seen]
    rounding = ROUNDINGS * torch.finfo(trace.query.dtype).eps
    bound = TOLERANCE * scores.abs().max() + rounding * scores.abs()
    fits: list[tuple[float, float, float | None]] = []
    for softcap in (None, *SOFT_CAPS):
        if softcap is not None and bool((scores.abs() >= softcap).any()):
            continue
        uncapped = scores if softcap is None else torch.atanh(scores / softcap) * softcap
        scale = float((uncapped * products).sum() / products.square().sum().clamp_min(1e-12))
        expected = scale * products if softcap is None else torch.tanh(scale * products / softcap) * softcap
        misfit = float(((scores - expected).abs() / bound.clamp_min(1e-12)).max())
        fits.append((misfit if softcap is None else misfit * CAP_ADVANTAGE, scale, softcap))
    misfit, scale, softcap = min(fits, key=lambda fit: fit[0])
    if not misfit <= 1:
        raise UnsupportedModelError(f"{name}: its scores are not scaled products of queries and keys; is a bias added?")
    return visibility, scale, softcap


def _visibility(allowed_HTT: Tensor, name: str) -> Visibility:
    """Who sees whom, from who did."""
    allowed = allowed_HTT[0]
    length = allowed.shape[0]
    if not bool((allowed_HTT == allowed).all()):
        raise UnsupportedModelError(f"{name}: its heads see different positions")
    if bool(allowed.triu(1).any()):
        raise UnsupportedModelError(f"{name}: its attention is not causal")
    width = int(allowed[-1].sum())
    chunk = next((i for i in range(1, length) if not bool(allowed[i, 0])), length)
    candidates = [Visibility(), Visibility(VisibilityKind.SLIDING, width), Visibility(VisibilityKind.CHUNKED, chunk)]
    positions = torch.arange(length, device=allowed.device)
    for candidate in candidates:
        first = torch.tensor([candidate.first_visible(i) for i in range(length)], device=allowed.device)
        expected = (positions[None] >= first[:, None]) & (positions[None] <= positions[:, None])
        if bool((expected == allowed).all()):
            return candidate
    raise UnsupportedModelError(f"{name}: its mask is neither full, sliding nor chunked")


def _repeats(key: Tensor, value: Tensor) -> int:
    """How many neighbouring heads are copies of each other, in keys and values both."""
    num_heads = key.shape[0]
    for repeats in range(num_heads, 1, -1):
        if num_heads % repeats:
            continue
        groups = [t.reshape(num_heads // repeats, repeats, -1) for t in (key, value)]
        if all(bool((group == group[:, :1]).all()) for group in groups):
            return repeats
    return 1

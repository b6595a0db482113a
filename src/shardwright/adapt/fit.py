"""From what an attention computed to what it means: scale, soft-cap, mask, bias, sinks, which heads are copies.

Everything is read off numbers of a real pass with the model's own weights, so it holds whatever the code looks like.
What does not fit is refused with a reason; what fits by accident is caught by the comparison of logits that follows
(worker/self_check.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwright.adapt.bias import Bias, distances_from, read_bias
from shardwright.adapt.followed import AttentionTrace
from shardwright.adapt.seen import HIDDEN, read_visibility
from shardwright.attention.layout import AttentionParams
from shardwright.cache.spec import LayerSpec, Visibility
from shardwright.errors import UnsupportedModelError

TOLERANCE = 2e-3
"""Largest misfit of scores, relative to the largest score, and of weights: float32 noise is far below, another formula
far above."""

ROUNDINGS = 4
"""So many times a number may have been rounded to the type of queries and keys, on top of that."""

LEAST_SINK = 1e-4
"""Weight that a sink must take somewhere to be seen."""

ONE_TOLERANCE = 1e-2
"""Sinks this near to zero are meant to be zero."""

CAP_ADVANTAGE = 4.0
"""So many times better a soft-cap must fit than none: one far above all scores fits as well as none."""

PERFECT = 4e-3
"""Misfit, in units of what is allowed, below which no other formula is tried."""

SOFT_CAPS = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0)
"""Caps to try where scores do not grow in proportion to the products."""


@dataclass(frozen=True, slots=True)
class FittedAttention:
    """One attention call, understood."""

    spec: LayerSpec
    params: AttentionParams
    """Without its bias, which reaches as far as sequences do."""
    repeats: int
    """Query heads that share a KV head which the code repeats: every `repeats`-th of its heads is kept."""
    bias: Bias | None = None
    first_column: int = 0
    """Of the scores, that belongs to a position."""
    order: Tensor | None = None
    """[H] int64: the code's heads, those that share a KV head beside each other; None if they are so."""
    scales_H: Tensor | None = None
    """[H] float32: what the queries of the code's heads are multiplied with, if each has its own scale."""

    def queries(self, query_HTD: Tensor) -> Tensor:
        """The code's queries as those of paged attention, each with its head's scale: [H, T, D]."""
        if self.scales_H is not None:
            query_HTD = query_HTD * self.scales_H[:, None, None].to(query_HTD.dtype)
        return query_HTD if self.order is None else query_HTD[self.order]

    def cached_heads(self, heads_HTD: Tensor) -> Tensor:
        """Of the code's heads of keys or values, one of those that are alike: [K, T, D]."""
        if self.order is not None:
            heads_HTD = heads_HTD.index_select(0, self.order)
        return heads_HTD[:: self.repeats]


@dataclass(frozen=True, slots=True)
class _Scores:
    """What goes into the softmax, understood."""

    visibility: Visibility
    scale: float
    softcap: float | None = None
    bias: Bias | None = None
    sinks_H: Tensor | None = None
    first_column: int = 0
    scales_H: Tensor | None = None
    """Of the heads, if they have different ones, in place of `scale`."""


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
    try:
        scores = _sdpa_scores(trace) if trace.is_sdpa else _fit_scores(trace, query, key)
    except UnsupportedModelError as exc:
        raise UnsupportedModelError(f"{name}: {exc}") from exc
    repeats, order = _shared_heads(key, value) if len(key) == len(query) else (1, None)
    sinks, bias = scores.sinks_H, scores.bias
    if order is not None:
        sinks = None if sinks is None else sinks[order]
        bias = None if bias is None else bias.of_heads(order)
    return FittedAttention(
        LayerSpec(
            name=name,
            num_heads=query.shape[0],
            num_kv_heads=key.shape[0] // repeats,
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            visibility=scores.visibility,
        ),
        AttentionParams(scale=scores.scale, softcap=scores.softcap, sinks_H=sinks),
        repeats,
        bias,
        scores.first_column,
        order,
        scores.scales_H,
    )


def with_biases(attentions: list[FittedAttention], num_positions: int) -> list[FittedAttention]:
    """The attentions with their biases among their parameters, for sequences of so many tokens; equal ones are kept
    once.

    Raises: UnsupportedModelError if a bias is not known that far.
    """
    distinct: list[Tensor] = []
    completed = []
    for attention in attentions:
        if attention.bias is not None:
            bias = attention.bias.over(min(num_positions, attention.spec.visibility.size or num_positions))
            known = next((other for other in distinct if torch.equal(other, bias)), None)
            if known is None:
                distinct.append(known := bias)
            attention = replace(attention, params=replace(attention.params, bias_HN=known))
        completed.append(attention)
    return completed


def _sdpa_scores(trace: AttentionTrace) -> _Scores:
    num_heads, length, dim = trace.query.shape
    scale = trace.options.get("scale")
    scale = dim**-0.5 if scale is None else float(scale)
    mask = trace.options.get("attn_mask")
    if trace.options.get("is_causal"):
        return _Scores(Visibility(), scale)
    if mask is None:
        raise UnsupportedModelError("its attention is not causal")
    rows = mask.detach().expand(*mask.shape[:-2], length, length).reshape(-1, length, length)
    allowed = rows if rows.dtype == torch.bool else rows > HIDDEN
    visibility = read_visibility(allowed)
    if rows.dtype == torch.bool:
        return _Scores(visibility, scale)
    positions, precision = torch.arange(length, device=rows.device), torch.finfo(rows.dtype).eps
    bias = read_bias(rows.float().expand(num_heads, -1, -1), allowed[0], positions, precision=precision)
    return _Scores(visibility, scale, bias=bias)


def _fit_scores(trace: AttentionTrace, query: Tensor, key: Tensor) -> _Scores:
    try:
        return _fit_softmax(trace, query, key, is_shifted=False)
    except UnsupportedModelError:  # a softmax is the same whatever is taken off a row, the largest score for example
        return _fit_softmax(trace, query, key, is_shifted=True)


def _fit_softmax(trace: AttentionTrace, query: Tensor, key: Tensor, *, is_shifted: bool) -> _Scores:
    assert trace.scores is not None
    assert trace.blank is not None
    assert trace.weights is not None
    length, precision = query.shape[1], torch.finfo(trace.query.dtype).eps
    weights = trace.weights.float()
    if weights.shape != (*trace.scores.shape[:2], length):
        raise UnsupportedModelError(f"its weights are {tuple(weights.shape)}")
    columns = _columns(trace.scores, weights)
    scores, blank = (tensor[..., columns].float() for tensor in (trace.scores, trace.blank))
    allowed = scores > HIDDEN
    if trace.blank_weights is not None and bool(allowed.all()):  # what is hidden is taken away after the exponential
        allowed = trace.blank_weights != 0
    visibility, seen = read_visibility(allowed), allowed[0]
    sums = weights.sum(-1)
    has_sinks = bool((1 - sums > LEAST_SINK + ROUNDINGS * precision).any())
    rows = torch.arange(length, device=blank.device)
    bias = read_bias(blank, seen, rows, precision=precision, ignores_rows=is_shifted or not has_sinks)
    products = query @ key.transpose(1, 2)
    scales, softcap = _scale_and_cap(scores - blank, products, scores, seen, precision, is_shifted=is_shifted)
    expected = _capped(scales[:, None, None] * products, softcap)
    if bias is not None:
        expected += bias.at(distances_from(rows, length))
    expected = expected.masked_fill(~seen, float("-inf"))
    totals = expected.logsumexp(-1)
    sinks = None
    if has_sinks:
        others = [i for i in range(trace.scores.shape[-1]) if not columns.start <= i < columns.stop]
        if others:
            taken_off = (expected - scores)[:, -1, -1]
            sinks = trace.scores[:, -1, others].float().logsumexp(-1) + taken_off
        else:
            sinks = _sinks(totals, sums)
        totals = totals.logaddexp(sinks[:, None])
    misfit = (weights - (expected - totals[..., None]).exp()).abs()
    rounded = ROUNDINGS * precision * (1 + scores.abs().masked_fill(~seen, 0).amax(-1, keepdim=True))
    if not bool((misfit <= TOLERANCE + rounded).all()):
        raise UnsupportedModelError("its weights are not the softmax of its scores")
    is_same = bool((scales == scales[0]).all())
    scale, by_head = (float(scales[0]), None) if is_same else (1.0, scales)
    return _Scores(visibility, scale, softcap, bias, sinks, columns.start, by_head)


def _columns(scores: Tensor, weights: Tensor) -> slice:
    """Which columns of the scores belong to positions: the first or the last ones."""
    length, width = weights.shape[-1], scores.shape[-1]
    if width == length:
        return slice(0, length)
    shares = scores.float().softmax(-1)
    choices = [slice(0, length), slice(width - length, width)]
    return min(choices, key=lambda columns: float((shares[..., columns] - weights).abs().max()))


def _scale_and_cap(
    rest: Tensor, products: Tensor, scores: Tensor, seen: Tensor, precision: float, *, is_shifted: bool
) -> tuple[Tensor, float | None]:
    """Scale of each head ([H]) and soft-cap that make products of queries and keys to scores without their bias.

    Args:
        rest: [H, T, T], scores less mask and bias.
        products: [H, T, T].
        scores: [H, T, T].
        seen: [T, T].
        precision: to which queries and keys are rounded.
        is_shifted: whether a number for each row was taken off.
    """

    def compared(values: Tensor) -> Tensor:
        own = torch.diagonal(values, dim1=-2, dim2=-1)[..., None] if is_shifted else 0
        return (values - own).expand_as(products)[:, seen]

    actual, straight, sizes = compared(rest), compared(products), scores.abs()[:, seen]
    largest = actual.abs().max()
    bound = TOLERANCE * largest + ROUNDINGS * precision * (sizes + (sizes.max() if is_shifted else 0))

    def misfit_of(scales: Tensor, softcap: float | None) -> float:
        expected = compared(_capped(scales[:, None, None] * products, softcap))
        return float(((actual - expected).abs() / bound.clamp_min(1e-12)).max())

    for is_by_head in (False, True):
        fits: list[tuple[float, Tensor, float | None]] = []
        for softcap in (None, *SOFT_CAPS):
            if softcap is None:
                uncapped = actual
            elif is_shifted or bool((rest[:, seen].abs() >= softcap).any()):
                continue
            else:
                uncapped = torch.atanh(actual / softcap) * softcap
            shares, squares = (uncapped * straight).sum(-1), straight.square().sum(-1)
            if not is_by_head:
                shares, squares = (sums.sum().expand(len(products)) for sums in (shares, squares))
            scales = shares / squares.clamp_min(1e-12)
            misfit = misfit_of(scales, softcap)
            fits.append((misfit if softcap is None else misfit * CAP_ADVANTAGE, scales, softcap))
            if misfit < PERFECT:
                break
        misfit, scales, softcap = min(fits, key=lambda fit: fit[0])
        if misfit <= 1:
            return scales, softcap
    raise UnsupportedModelError("its scores are not scaled products of queries and keys, with or without a bias")


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _sinks(totals: Tensor, sums: Tensor) -> Tensor:
    """Logit of each head that takes its part of the softmax and has no value: [H].

    Args:
        totals: [H, T], logarithms of the sums over the positions alone.
        sums: [H, T], of the weights of the positions.
    """
    clearest = ((1 - sums) * sums).argmax(-1, keepdim=True)
    share = sums.gather(-1, clearest)
    sinks: Tensor = (totals.gather(-1, clearest) + torch.log((1 - share) / share))[:, 0]
    is_clear = (1 - share[:, 0]) > LEAST_SINK
    is_one = bool((sinks[is_clear].abs() < ONE_TOLERANCE).all())  # added to the sum, it is the same for all heads
    return torch.zeros_like(sinks) if is_one else sinks


def _shared_heads(key: Tensor, value: Tensor) -> tuple[int, Tensor | None]:
    """How many heads each are copies of one another, in keys and values both, and, if these are no neighbours, an order
    in which they are.
    """
    groups: list[list[int]] = []
    for head in range(len(key)):
        same = (g for g in groups if torch.equal(key[g[0]], key[head]) and torch.equal(value[g[0]], value[head]))
        if (group := next(same, None)) is not None:
            group.append(head)
        else:
            groups.append([head])
    if len({len(group) for group in groups}) > 1:
        return 1, None
    order = [head for group in groups for head in group]
    return len(groups[0]), None if order == sorted(order) else torch.tensor(order, device=key.device)

"""The requests of a forward pass, as modules see them that run their own attention: one by one, or a few at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from shardwright.adapt.own_cache import OwnRows
from shardwright.adapt.paged import PagedStep
from shardwright.cache.spec import Visibility, VisibilityKind

MOST_PADDING = 2
"""Requests that decode together have contexts that differ by less than this factor,"""
FREE_PADDING = 32
"""or by less than so many tokens;"""
MOST_CONTEXT = 8192
"""and all of them, as long as the longest, take no more memory than a prompt of so many tokens."""


@dataclass(frozen=True, slots=True)
class OwnRequest:
    """One request of a forward pass."""

    index: int
    """Among those of the pass."""
    start: int
    """Of its tokens, among those of the pass."""
    num_tokens: int
    """That are new."""
    num_computed: int
    """That came before."""

    @property
    def is_decode(self) -> bool:
        """Whether it goes on by one token."""
        return self.num_tokens == 1 and self.num_computed > 0

    @property
    def end(self) -> int:
        """Tokens after the pass."""
        return self.num_computed + self.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class OwnTurn:
    """Those for which a module is called at once: one request, or several with one new token each."""

    index: int
    """Among the turns of the pass."""
    requests: tuple[OwnRequest, ...]

    @property
    def num_tokens(self) -> int:
        """New ones, of each request."""
        return self.requests[0].num_tokens

    @property
    def num_computed(self) -> int:
        """Of the longest request."""
        return max(request.num_computed for request in self.requests)

    def length(self, visibility: Visibility) -> int:
        """Tokens that the new ones may see, with themselves, of the request that sees most."""
        return max(request.end - visibility.first_visible(request.num_computed) for request in self.requests)

    def first(self, visibility: Visibility) -> int:
        """Position of the first of them, if all requests were as long as the longest."""
        return self.num_computed + self.num_tokens - self.length(visibility)


class OwnRequests(Protocol):
    """All requests of a forward pass, and where they keep what they keep."""

    turns: list[OwnTurn]
    in_batch: bool
    """Whether each has a place in the batch dimension, with one new token, and not tokens in one sequence."""
    order: Tensor | None
    """[T] int64: the place of each token of the pass among those of all turns; None if it is the same."""

    def rows(self, layer: int, turn: OwnTurn, visibility: Visibility) -> OwnRows | None:
        """The rows of a turn in a layer of the cache that keeps what is visible; None if nothing is kept."""
        ...


class LonePrompt:
    """One request that begins, of which nothing is kept: a look at the model.

    Args:
        num_tokens: of the prompt.
    """

    in_batch = False
    order: Tensor | None = None

    def __init__(self, num_tokens: int) -> None:
        self.turns = [OwnTurn(0, (OwnRequest(0, 0, num_tokens, 0),))]

    def rows(self, layer: int, turn: OwnTurn, visibility: Visibility) -> OwnRows | None:
        return None


class PagedRequests:
    """The requests of a step on the paged cache.

    Args:
        step: that is in progress.
        in_batch: see OwnRequests.
        together: whether those that decode take their turn together.
    """

    def __init__(self, step: PagedStep, *, in_batch: bool, together: bool) -> None:
        layout = step.inputs.layout
        starts, counts, computed = (
            values.tolist() for values in (layout.query_starts[:-1], layout.num_tokens, layout.num_computed)
        )
        requests = [OwnRequest(i, *sizes) for i, sizes in enumerate(zip(starts, counts, computed, strict=True))]
        groups: list[tuple[OwnRequest, ...]] = [(request,) for request in requests]
        if together and in_batch:  # all or none: states that the code around keeps in this order are theirs
            longest = max((request.end for request in requests), default=0)
            groups = [tuple(requests)] if len(requests) * longest <= MOST_CONTEXT else groups
        elif together:
            groups = _grouped(requests)
        self.turns = [OwnTurn(i, group) for i, group in enumerate(groups)]
        self.in_batch = in_batch
        self._step = step
        self._device = step.inputs.input_ids.device
        self._slots = cache(self._find_slots)
        taken = list(chain(*(range(r.start, r.start + r.num_tokens) for turn in self.turns for r in turn.requests)))
        self.order: Tensor | None = None
        if taken != sorted(taken):
            self.order = torch.tensor(taken).argsort().to(self._device)

    def rows(self, layer: int, turn: OwnTurn, visibility: Visibility) -> OwnRows:
        kv_cache = self._step.cache
        slots = self._slots(kv_cache.group_of_layer[layer], turn, visibility)
        new_slots = slots[:, -turn.num_tokens :].flatten()
        rows_NC = kv_cache.layers[layer].keys_NKD[:, 0]
        return OwnRows(rows_NC, new_slots, slots.flatten(), len(turn.requests), turn.first(visibility))

    def _find_slots(self, group: int, turn: OwnTurn, visibility: Visibility) -> Tensor:
        """Where the tokens lie that are visible: [S, L] int64; the null block's first one stands before short ones."""
        block_size, length = self._step.backend.block_size, turn.length(visibility)
        lines = []
        for request in turn.requests:
            table = torch.as_tensor(self._step.inputs.block_tables[group][request.index], dtype=torch.int64)
            positions = torch.arange(visibility.first_visible(request.num_computed), request.end)
            slots = table[positions // block_size] * block_size + positions % block_size
            lines.append(F.pad(slots, (length - len(slots), 0)))
        return torch.stack(lines).to(self._device)


def _grouped(requests: Sequence[OwnRequest]) -> list[tuple[OwnRequest, ...]]:
    """Those that decode, in groups of about the same length, and the others one by one; about in the order they had."""
    others = [(request,) for request in requests if not request.is_decode]
    groups: list[list[OwnRequest]] = []
    for request in sorted(requests, key=lambda request: request.num_computed):
        if not request.is_decode:
            continue
        shortest = groups[-1][0].num_computed if groups else 0
        is_long = request.num_computed > max(MOST_PADDING * shortest, shortest + FREE_PADDING)
        if not groups or is_long or (len(groups[-1]) + 1) * request.end > MOST_CONTEXT:
            groups.append([])
        groups[-1].append(request)
    ordered = [tuple(sorted(group, key=lambda request: request.index)) for group in groups]
    return sorted([*ordered, *others], key=lambda group: group[0].index)


def make_mask(
    visibility: Visibility,
    turn: OwnTurn,
    first: int,
    *,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mask that Transformers would have made for these requests alone: [S, 1, T, L].

    Args:
        visibility: what it lets a token see.
        turn: whose it is.
        first: position of the first token that it covers, as of `turn.first`.
        implementation: of the attention that takes it.
        dtype: of the model.
        device: of the mask.
    """
    if len(turn.requests) > 1:
        seen = _visible_of_several(visibility, turn, first).to(device)
        if implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    function: Callable[..., Any] = causal_mask_function
    if visibility.size is not None and visibility.kind is VisibilityKind.SLIDING:
        function = sliding_window_causal_mask_function(visibility.size)
    elif visibility.size is not None:
        function = chunked_causal_mask_function(visibility.size, torch.zeros(1, dtype=torch.int64, device=device))
    mask: Tensor = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=1,
        q_length=turn.num_tokens,
        kv_length=turn.num_computed + turn.num_tokens - first,
        q_offset=turn.num_computed,
        kv_offset=first,
        mask_function=function,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=device,
    )
    return mask


def _visible_of_several(visibility: Visibility, turn: OwnTurn, first: int) -> Tensor:
    """What the last token of each of several requests sees: [S, 1, 1, L] bool."""
    length = turn.num_computed + turn.num_tokens - first
    seen = [request.end - visibility.first_visible(request.num_computed) for request in turn.requests]
    return (torch.arange(length) >= length - torch.tensor(seen)[:, None])[:, None, None]

"""The requests of a forward pass, as modules see them that run their own attention: one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from shardwright.adapt.own_cache import RequestRows
from shardwright.adapt.paged import PagedStep
from shardwright.cache.spec import Visibility, VisibilityKind


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


class OwnRequests(Protocol):
    """All requests of a forward pass, and where they keep what they keep."""

    requests: list[OwnRequest]
    in_batch: bool
    """Whether each has a place in the batch dimension, with one new token, and not tokens in one sequence."""

    def rows(self, layer: int, request: OwnRequest, first: int) -> RequestRows | None:
        """The rows of a request in a layer of the cache, from the position `first` on; None if nothing is kept."""
        ...


class LonePrompt:
    """One request that begins, of which nothing is kept: a look at the model.

    Args:
        num_tokens: of the prompt.
    """

    in_batch = False

    def __init__(self, num_tokens: int) -> None:
        self.requests = [OwnRequest(0, 0, num_tokens, 0)]

    def rows(self, layer: int, request: OwnRequest, first: int) -> RequestRows | None:
        return None


class PagedRequests:
    """The requests of a step on the paged cache.

    Args:
        step: that is in progress.
        in_batch: see OwnRequests.
    """

    def __init__(self, step: PagedStep, *, in_batch: bool) -> None:
        layout = step.inputs.layout
        starts, counts, computed = (
            values.tolist() for values in (layout.query_starts[:-1], layout.num_tokens, layout.num_computed)
        )
        self.requests = [OwnRequest(i, *sizes) for i, sizes in enumerate(zip(starts, counts, computed, strict=True))]
        self.in_batch = in_batch
        self._step = step
        self._slots = cache(self._find_slots)

    def rows(self, layer: int, request: OwnRequest, first: int) -> RequestRows:
        kv_cache = self._step.cache
        slots = self._slots(kv_cache.group_of_layer[layer], request, first)
        return RequestRows(kv_cache.layers[layer].keys_NKD[:, 0], slots[-request.num_tokens :], slots)

    def _find_slots(self, group: int, request: OwnRequest, first: int) -> Tensor:
        """Where the tokens of a request lie from the position `first` on: [L] int64."""
        block_size, inputs = self._step.backend.block_size, self._step.inputs
        table = torch.as_tensor(inputs.block_tables[group][request.index], dtype=torch.int64)
        positions = torch.arange(first, request.num_computed + request.num_tokens)
        slots = table[positions // block_size] * block_size + positions % block_size
        return slots.to(inputs.input_ids.device)


def make_mask(
    visibility: Visibility,
    request: OwnRequest,
    first: int,
    *,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mask that Transformers would have made for a request on its own: [1, 1, T, L].

    Args:
        visibility: what it lets a token see.
        request: whose it is.
        first: position of the first token that it covers.
        implementation: of the attention that takes it.
        dtype: of the model.
        device: of the mask.
    """
    function: Callable[..., Any] = causal_mask_function
    if visibility.size is not None and visibility.kind is VisibilityKind.SLIDING:
        function = sliding_window_causal_mask_function(visibility.size)
    elif visibility.size is not None:
        function = chunked_causal_mask_function(visibility.size, torch.zeros(1, dtype=torch.int64, device=device))
    mask: Tensor = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=1,
        q_length=request.num_tokens,
        kv_length=request.num_computed + request.num_tokens - first,
        q_offset=request.num_computed,
        kv_offset=first,
        mask_function=function,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=device,
    )
    return mask

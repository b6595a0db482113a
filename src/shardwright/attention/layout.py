"""How the tokens of a step lie in the packed batch, and the protocol of a back end.

Shape suffixes here and in the back ends: T tokens of the step, S sequences in it, H query heads, K key/value heads, G =
H / K, D head size of queries and keys, V head size of values, L context length, B blocks, N distances, R size of a
latent, C what is cached of a token that has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from shardwright.attention.kv_cache import LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.cache.spec import Visibility


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The sequences of one step, in packed order: sequence i owns tokens query_starts[i] to query_starts[i + 1].

    Its first token in this step is at position `num_computed[i]` of the sequence; after the step its context is
    `num_computed[i] + num_tokens[i]` tokens long.
    """

    num_computed: np.ndarray
    """[S] int64."""
    num_tokens: np.ndarray
    """[S] int64."""
    query_starts: np.ndarray
    """[S + 1] int64."""

    @property
    def is_decode(self) -> np.ndarray:
        """[S]: sequences of one token that have others before it."""
        return decodes(self.num_tokens, self.num_computed)


def decodes(num_tokens: np.ndarray, num_computed: np.ndarray) -> np.ndarray:
    """Which sequences of a step are decodes: [S] of [S] and [S]."""
    is_decode: np.ndarray = (num_tokens == 1) & (num_computed > 0)
    return is_decode


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What one layer's code asks of its attention, the same at every step."""

    scale: float
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap)."""
    sinks_H: Tensor | None = None
    """A logit per head that takes part in the softmax and has no value."""
    bias_HN: Tensor | None = None
    """[H, N] float32: added to scores, after a soft-cap, by the distance from query back to key; distances of N and
    more take the last."""


class AttentionBackend(Protocol):
    """Computes attention over the paged cache."""

    block_size: int

    def prepare(self, layout: StepLayout, block_tables: np.ndarray, visibility: Visibility) -> Any:
        """Work done once per step and cache group.

        Args:
            layout: of the step.
            block_tables: [S, max blocks] int32, rows in the order of the layout.
            visibility: of the group's layers.

        Returns: a plan for `forward`, whatever the back end likes.
        """
        ...

    def write(self, cache: LayerCache, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        """Store a step's keys and values in a layer's cache; as LayerCache.write."""
        ...

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: Any,
        params: AttentionParams,
    ) -> Tensor:
        """Attention of one layer; keys and values of this step are in the cache already.

        Args:
            query_THD: [T, H, D], model dtype.
            key_TKD: [T, K, D], of this step's tokens.
            value_TKV: [T, K, V], of this step's tokens.
            cache: of this layer.
            plan: from `prepare`, for this layer's group.
            params: of this layer.

        Returns: [T, H, V], dtype of the query.
        """
        ...

    def forward_latent(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: Any,
        params: AttentionParams,
        projection: LatentProjection,
    ) -> Tensor:
        """As `forward`, of a layer whose cache holds latents; those of this step are in it already.

        Args:
            query_THD, key_TKD, value_TKV, plan, params: as in `forward`.
            cache: of this layer, one KV head of rows [latent | shared part of the keys].
            projection: makes keys and values of latents.

        Returns: [T, H, V], dtype of the query.
        """
        ...


@runtime_checkable
class CapturableBackend(AttentionBackend, Protocol):
    """One whose decodes depend on tensors alone, so that they can be captured and repeated."""

    def prepare_decodes(
        self,
        block_tables: Tensor,
        query_starts: Tensor,
        num_computed: Tensor,
        sequences: Tensor,
        visibility: Visibility,
        *,
        longest: int,
    ) -> Any:
        """A plan for steps of one token per sequence, whose tensors are filled anew for each step.

        Args:
            block_tables: [S, max blocks] int32.
            query_starts: [S + 1] int32, 0 to S.
            num_computed: [S] int32.
            sequences: [S] int32, 0 to S - 1.
            visibility: of the group's layers.
            longest: most tokens that a context will ever have.
        """
        ...

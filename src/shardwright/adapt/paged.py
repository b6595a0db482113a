"""One forward pass on the paged cache: what its attention calls read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from shardwright.attention.kv_cache import KVCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionBackend, AttentionParams, StepLayout


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What goes into the model's forward in one step: the tokens of all sequences, one after another."""

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64: position of each token in its own sequence."""
    slot_mappings: Sequence[Tensor]
    """Per cache group, [T] int64: where each token's key and value go."""
    plans: Sequence[Any]
    """Per cache group, what AttentionBackend.prepare returned."""
    logits_rows: Tensor
    """[R] int64: tokens whose next-token logits are wanted."""
    layout: StepLayout
    block_tables: Sequence[np.ndarray]
    """Per cache group, [S, max blocks] int32, rows in the order of the layout."""


@dataclass(frozen=True, slots=True)
class PagedStep:
    """The step in progress, with the cache and the back end that it runs on."""

    inputs: ForwardInputs
    cache: KVCache
    backend: AttentionBackend

    def attend(
        self,
        index: int,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        params: AttentionParams,
        latent: tuple[Tensor, LatentProjection] | None = None,
    ) -> Tensor:
        """Keep the keys and values of a layer, or what they are made of, and attend.

        Args:
            index: of the attention call, which is its layer in the cache.
            query_THD: [T, H, D].
            key_TKD: [T, K, D].
            value_TKV: [T, K, V].
            params: of the call.
            latent: [T, R], and what makes keys and values of it; None for a layer whose cache holds these.

        Returns: [T, H, V], dtype of the query.
        """
        layer, group = self.cache.layers[index], self.cache.group_of_layer[index]
        slots, plan = self.inputs.slot_mappings[group], self.inputs.plans[group]
        if latent is None:
            self.backend.write(layer, slots, key_TKD, value_TKV)
            return self.backend.forward(query_THD, key_TKD, value_TKV, layer, plan, params)
        latent_TR, projection = latent
        rows_T1C = projection.rows(latent_TR, key_TKD)[:, None]
        self.backend.write(layer, slots, rows_T1C, rows_T1C[..., : projection.latent_dim])
        return self.backend.forward_latent(query_THD, key_TKD, value_TKV, layer, plan, params, projection)

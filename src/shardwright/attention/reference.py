"""Paged attention written plainly, one sequence at a time in float32: the oracle of every back end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.attention.kv_cache import LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionParams, StepLayout
from shardwright.cache.spec import Visibility


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """Just what `prepare` was given."""

    layout: StepLayout
    block_tables: np.ndarray
    visibility: Visibility


class ReferenceBackend:
    """Implements AttentionBackend with loops."""

    def __init__(self, *, block_size: int) -> None:
        self.block_size = block_size

    def prepare(self, layout: StepLayout, block_tables: np.ndarray, visibility: Visibility) -> ReferencePlan:
        return ReferencePlan(layout, block_tables, visibility)

    def write(self, cache: LayerCache, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        cache.write(slot_mapping, key_TKD, value_TKV)

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: ReferencePlan,
        params: AttentionParams,
    ) -> Tensor:
        return self._forward(query_THD, cache, plan, params, None)

    def forward_latent(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: ReferencePlan,
        params: AttentionParams,
        projection: LatentProjection,
    ) -> Tensor:
        return self._forward(query_THD, cache, plan, params, projection)

    def _forward(
        self,
        query_THD: Tensor,
        cache: LayerCache,
        plan: ReferencePlan,
        params: AttentionParams,
        projection: LatentProjection | None,
    ) -> Tensor:
        layout, outputs = plan.layout, []
        for i in range(len(layout.num_tokens)):
            start, length = int(layout.num_computed[i]), int(layout.num_tokens[i])
            context = start + length
            num_blocks = -(-context // cache.block_size)
            blocks = torch.from_numpy(plan.block_tables[i, :num_blocks].astype(np.int64)).to(query_THD.device)
            keys, values = (rows[:context].float() for rows in cache.gather(blocks))
            if projection is not None:
                keys, values = expand(keys[:, 0], projection)
            first, last = int(layout.query_starts[i]), int(layout.query_starts[i + 1])
            mask = torch.zeros(length, context, dtype=torch.bool, device=query_THD.device)
            for j in range(length):
                mask[j, plan.visibility.first_visible(start + j) : start + j + 1] = True
            outputs.append(attend(query_THD[first:last], keys, values, mask, params))
        return torch.cat(outputs).to(query_THD.dtype)


def expand(rows_LC: Tensor, projection: LatentProjection) -> tuple[Tensor, Tensor]:
    """Keys and values of cached latents, head by head.

    Args:
        rows_LC: [L, C] float32.
        projection: of the layer.

    Returns: [L, K, D] and [L, K, V], float32.
    """
    latent, shared = rows_LC[:, : projection.latent_dim], rows_LC[:, projection.latent_dim :]
    keys, values = [], []
    for up_key, up_value in zip(projection.up_key_KNR.float(), projection.up_value_KVR.float(), strict=True):
        own = latent @ up_key.T
        key = own.new_empty(len(own), own.shape[1] + shared.shape[1])
        is_shared = torch.zeros(key.shape[1], dtype=torch.bool)
        is_shared[projection.shared] = True
        key[:, is_shared], key[:, ~is_shared] = shared, own
        keys.append(key)
        values.append(latent @ up_value.T)
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


def attend(query_THD: Tensor, keys_LKD: Tensor, values_LKV: Tensor, mask_TL: Tensor, params: AttentionParams) -> Tensor:
    """Softmax attention of some queries over one context.

    Args:
        query_THD: [T, H, D].
        keys_LKD: [L, K, D]; query head h reads KV head h // (H / K).
        values_LKV: [L, K, V].
        mask_TL: [T, L] bool, true where a query sees a position; every query sees at least one.
        params: scale, soft-capping, sinks, bias. The last query stands at the last position.

    Returns: [T, H, V] float32.
    """
    num_tokens, num_heads, dim = query_THD.shape
    num_kv_heads = keys_LKD.shape[1]
    query = query_THD.float().view(num_tokens, num_kv_heads, num_heads // num_kv_heads, dim)
    scores = torch.einsum("tkgd,lkd->tkgl", query, keys_LKD.float()) * params.scale
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if params.bias_HN is not None:
        distances = torch.arange(num_tokens)[:, None] + len(keys_LKD) - num_tokens - torch.arange(len(keys_LKD))
        bias_HTL = params.bias_HN.float()[:, distances.clamp(0, params.bias_HN.shape[1] - 1).to(query_THD.device)]
        scores = scores + bias_HTL.unflatten(0, (num_kv_heads, -1)).permute(2, 0, 1, 3)
    scores = scores.masked_fill(~mask_TL[:, None, None, :], float("-inf"))
    if params.sinks_H is not None:
        sinks = params.sinks_H.float().view(1, num_kv_heads, -1, 1).expand(num_tokens, -1, -1, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("tkgl,lkv->tkgv", weights, values_LKV.float()).reshape(num_tokens, num_heads, -1)

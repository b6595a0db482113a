"""Paged attention on torch's own operators, on any device: decodes batched, prompts one by one.

Everything that does not depend on the layer is worked out once per step (`prepare`): which blocks to gather, and the
masks. A layer then costs a gather and one scaled_dot_product_attention per piece:
  * decodes whose contexts are of similar length are gathered together into [S, L] and masked;
  * a prompt whose keys are all in this step needs no gather: plain causal attention over the step's own keys and
  values;
  * a prompt that goes on (a later chunk, or after a prefix hit) gathers its context and is masked.
Query heads that share a KV head stand in for query positions, so keys and values are never repeated.
Latents (see attention/latent.py) are one KV head that all query heads share; a prompt that goes on may make keys and
values of them first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.attention.arrays import on_device
from shardwright.attention.kv_cache import LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionParams, StepLayout
from shardwright.cache.spec import Visibility

MAX_SCORE_BYTES = 64 << 20
"""Memory that the explicit score matrices of one piece may take; longer prompts are cut by queries."""


@dataclass(frozen=True, slots=True)
class DecodePiece:
    """Sequences with one query each and contexts of similar length."""

    tokens: Tensor
    """[S] int64: where their queries stand in the step."""
    blocks: Tensor
    """[S * B] int64: blocks to gather, padded with the null block."""
    mask_SL: Tensor
    """[S, L] bool, L = B * block_size."""
    own_S: Tensor
    """[S] int64: place of each query's own key among those gathered."""


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """Consecutive queries of one sequence."""

    first: int
    last: int
    """Queries are the step's tokens first to last - 1."""
    blocks: Tensor | None
    """[B] int64, blocks to gather; None: the context is exactly the step's own keys and values."""
    context: int
    """Gathered tokens that exist; the last block may be longer."""
    mask_TL: Tensor | None
    """[T, context] bool; None: plain causal."""


@dataclass(frozen=True, slots=True)
class BatchedPlan:
    """The pieces of one step and cache group."""

    decodes: list[DecodePiece]
    prompts: list[PromptPiece]


class BatchedBackend:
    """Implements AttentionBackend.

    Args:
        block_size: tokens per block.
        device: of model and cache.
        compute_dtype: products are computed in this type; float32 where the device is slow at the model's own.
    """

    def __init__(self, *, block_size: int, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.block_size = block_size
        self.device = device
        self.compute_dtype = compute_dtype

    def prepare(self, layout: StepLayout, block_tables: np.ndarray, visibility: Visibility) -> BatchedPlan:
        is_decode = layout.is_decode
        prompts = self.prepare_prompts(layout, np.flatnonzero(~is_decode), block_tables, visibility).prompts
        return BatchedPlan(self._decodes(layout, np.flatnonzero(is_decode), block_tables, visibility), prompts)

    def prepare_prompts(
        self, layout: StepLayout, sequences: np.ndarray, block_tables: np.ndarray, visibility: Visibility
    ) -> BatchedPlan:
        """As `prepare`, for some of the sequences, all taken as prompts; `forward` leaves other tokens undefined."""
        return BatchedPlan([], [self._prompt(layout, i, block_tables, visibility) for i in sequences.tolist()])

    def write(self, cache: LayerCache, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        cache.write(slot_mapping, key_TKD, value_TKV)

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: BatchedPlan,
        params: AttentionParams,
    ) -> Tensor:
        num_kv_heads, value_dim = value_TKV.shape[1:]
        query_TKGD = query_THD.to(self.compute_dtype).unflatten(1, (num_kv_heads, -1))
        output_TKGV = query_THD.new_empty(*query_TKGD.shape[:3], value_dim)
        for decode in plan.decodes:
            num_sequences = len(decode.tokens)
            keys, values = cache.gather(decode.blocks)
            output_TKGV[decode.tokens] = _decode_attention(
                query_TKGD[decode.tokens],
                self._by_sequence(keys, num_sequences),
                self._by_sequence(values, num_sequences),
                decode,
                params,
            ).to(output_TKGV.dtype)
        for prompt in plan.prompts:
            if prompt.blocks is None:
                keys, values = key_TKD[prompt.first : prompt.last], value_TKV[prompt.first : prompt.last]
            else:
                keys, values = (rows[: prompt.context] for rows in cache.gather(prompt.blocks))
            output_TKGV[prompt.first : prompt.last] = _prompt_attention(
                query_TKGD[prompt.first : prompt.last],
                keys.to(self.compute_dtype),
                values.to(self.compute_dtype),
                prompt.mask_TL,
                params,
            ).to(output_TKGV.dtype)
        return output_TKGV.flatten(1, 2)

    def forward_latent(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: BatchedPlan,
        params: AttentionParams,
        projection: LatentProjection,
    ) -> Tensor:
        projection = projection.to(self.compute_dtype)
        query_THD = query_THD.to(self.compute_dtype)
        output_THV = value_TKV.new_empty(*query_THD.shape[:2], value_TKV.shape[2])
        for decode in plan.decodes:
            rows, latents = (self._by_sequence(part, len(decode.tokens)) for part in cache.gather(decode.blocks))
            query = projection.absorbed(query_THD[decode.tokens])
            latent_S1HR = _decode_attention(query[:, None], rows, latents, decode, params)
            output_THV[decode.tokens] = projection.values_of(latent_S1HR[:, 0]).to(output_THV.dtype)
        for prompt in plan.prompts:
            tokens = slice(prompt.first, prompt.last)
            query = query_THD[tokens]
            if prompt.blocks is None:  # the model's code has made keys and values of all that is seen
                keys, values = (part[tokens].to(self.compute_dtype) for part in (key_TKD, value_TKV))
                output = _prompt_heads(query, keys, values, prompt.mask_TL, params)
            else:
                rows, latents = (part[: prompt.context].to(self.compute_dtype) for part in cache.gather(prompt.blocks))
                if projection.pays_to_expand(num_queries=len(query), context=len(rows)):
                    keys, values = projection.expanded(rows[:, 0])
                    output = _prompt_heads(query, keys, values, prompt.mask_TL, params)
                else:
                    latent_THR = _prompt_heads(projection.absorbed(query), rows, latents, prompt.mask_TL, params)
                    output = projection.values_of(latent_THR)
            output_THV[tokens] = output.to(output_THV.dtype)
        return output_THV

    def _by_sequence(self, rows: Tensor, num_sequences: int) -> Tensor:
        """[S * L, K, D] as [S, K, L, D], in the compute dtype."""
        sequences: Tensor = rows.to(self.compute_dtype).unflatten(0, (num_sequences, -1))
        return sequences.transpose(1, 2)

    def _decodes(
        self, layout: StepLayout, sequences: np.ndarray, block_tables: np.ndarray, visibility: Visibility
    ) -> list[DecodePiece]:
        """Gather plans of decodes, each over contexts of at most about twice the shortest's length."""
        positions = layout.num_computed[sequences]
        first_visible = visibility.first_visible_of(positions)
        first_block = first_visible // self.block_size
        num_blocks = positions // self.block_size + 1 - first_block
        order = np.argsort(num_blocks, kind="stable")
        pieces, start = [], 0
        while start < len(order):
            limit = max(2 * num_blocks[order[start]], 8)
            end = start + int(np.searchsorted(num_blocks[order[start:]], limit, side="right"))
            chosen = order[start:end]
            width = int(num_blocks[chosen].max())
            columns = first_block[chosen, None] + np.arange(width)
            exists = np.arange(width) < num_blocks[chosen, None]
            tables = block_tables[sequences[chosen]]
            blocks = np.where(exists, np.take_along_axis(tables, np.where(exists, columns, 0), axis=1), 0)
            places = first_block[chosen, None] * self.block_size + np.arange(width * self.block_size)
            mask = (places >= first_visible[chosen, None]) & (places <= positions[chosen, None])
            tokens = layout.query_starts[:-1][sequences[chosen]]
            own = positions[chosen] - places[:, 0]
            pieces.append(DecodePiece(*on_device((tokens, blocks.ravel(), mask, own), self.device)))
            start = end
        return pieces

    def _prompt(self, layout: StepLayout, i: int, block_tables: np.ndarray, visibility: Visibility) -> PromptPiece:
        start, length = int(layout.num_computed[i]), int(layout.num_tokens[i])
        first, last = int(layout.query_starts[i]), int(layout.query_starts[i + 1])
        context = start + length
        sees_all = visibility.first_visible(context - 1) == 0
        if start == 0 and sees_all:
            return PromptPiece(first, last, None, length, None)
        origin = 0 if start == 0 else visibility.first_visible(start) // self.block_size * self.block_size
        queries = np.arange(start, context)
        places = np.arange(origin, context)
        mask = places <= queries[:, None]
        if not sees_all:
            mask &= places >= visibility.first_visible_of(queries)[:, None]
        if start == 0:
            return PromptPiece(first, last, None, length, self._tensor(mask))
        blocks = block_tables[i, origin // self.block_size : -(-context // self.block_size)]
        return PromptPiece(first, last, self._tensor(blocks.astype(np.int64)), context - origin, self._tensor(mask))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return on_device([array], self.device)[0]


def _decode_attention(
    query_SKGD: Tensor, keys_SKLD: Tensor, values_SKLV: Tensor, piece: DecodePiece, params: AttentionParams
) -> Tensor:
    """One query per sequence; returns [S, K, G, V]."""
    mask = piece.mask_SL[:, None, None, :]
    if _is_plain(params):
        return F.scaled_dot_product_attention(query_SKGD, keys_SKLD, values_SKLV, attn_mask=mask, scale=params.scale)
    scores_SKGL = torch.matmul(query_SKGD, keys_SKLD.transpose(-1, -2))
    bias = None
    if params.bias_HN is not None:
        bias_HSL = _bias(params.bias_HN, piece.own_S, keys_SKLD.shape[2])
        bias = bias_HSL.unflatten(0, scores_SKGL.shape[1:3]).permute(2, 0, 1, 3)
    weights = _weights(scores_SKGL, mask, bias, params, head_dims=(1, 2))
    return torch.matmul(weights.to(values_SKLV.dtype), values_SKLV)


def _prompt_heads(
    query_THD: Tensor, keys_LKD: Tensor, values_LKV: Tensor, mask_TL: Tensor | None, params: AttentionParams
) -> Tensor:
    """As `_prompt_attention`, for query heads in one dimension; returns [T, H, V]."""
    query_TKGD = query_THD.unflatten(1, (keys_LKD.shape[1], -1))
    return _prompt_attention(query_TKGD, keys_LKD, values_LKV, mask_TL, params).flatten(1, 2)


def _prompt_attention(
    query_TKGD: Tensor, keys_LKD: Tensor, values_LKV: Tensor, mask_TL: Tensor | None, params: AttentionParams
) -> Tensor:
    """Queries of one sequence; returns [T, K, G, V]."""
    num_tokens, num_kv_heads, group, _ = query_TKGD.shape
    query_KGTD = query_TKGD.permute(1, 2, 0, 3)
    keys_K1LD = keys_LKD.transpose(0, 1)[:, None]
    values_K1LV = values_LKV.transpose(0, 1)[:, None]
    if _is_plain(params):
        output = F.scaled_dot_product_attention(
            query_KGTD,
            keys_K1LD.expand(-1, group, -1, -1),
            values_K1LV.expand(-1, group, -1, -1),
            attn_mask=mask_TL,
            is_causal=mask_TL is None,
            scale=params.scale,
        )
        return output.permute(2, 0, 1, 3)
    context = keys_LKD.shape[0]
    if mask_TL is None:
        mask_TL = torch.ones(num_tokens, context, dtype=torch.bool, device=query_TKGD.device).tril_()
    rows = max(1, MAX_SCORE_BYTES // (4 * num_kv_heads * group * context))
    outputs = []
    own_T = torch.arange(context - num_tokens, context, device=query_TKGD.device)
    for start in range(0, num_tokens, rows):
        scores = torch.matmul(query_KGTD[:, :, start : start + rows], keys_K1LD.transpose(-1, -2))
        bias = None
        if params.bias_HN is not None:
            bias_HTL = _bias(params.bias_HN, own_T[start : start + rows], context)
            bias = bias_HTL.unflatten(0, (num_kv_heads, group))
        weights = _weights(scores, mask_TL[start : start + rows], bias, params, head_dims=(0, 1))
        outputs.append(torch.matmul(weights.to(values_LKV.dtype), values_K1LV))
    return torch.cat(outputs, dim=2).permute(2, 0, 1, 3)


def _is_plain(params: AttentionParams) -> bool:
    """Whether scaled_dot_product_attention does all that is asked."""
    return params.softcap is None and params.sinks_H is None and params.bias_HN is None


def _bias(bias_HN: Tensor, own_T: Tensor, context: int) -> Tensor:
    """What is added to the scores of queries whose own keys stand at these places of a context: [H, T, context]."""
    distances = own_T[:, None] - torch.arange(context, device=own_T.device)
    return bias_HN[:, distances.clamp_(0, bias_HN.shape[1] - 1)]


def _weights(
    scores: Tensor, mask: Tensor, bias: Tensor | None, params: AttentionParams, *, head_dims: tuple[int, int]
) -> Tensor:
    """Softmax weights in float32 from raw products; `mask` and `bias` broadcast to `scores`, whose dims `head_dims` are
    K and G.
    """
    scores = scores.float() * params.scale
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf"))
    if params.sinks_H is None:
        return scores.softmax(-1)
    shape = [1] * scores.ndim
    for dim in head_dims:
        shape[dim] = scores.shape[dim]
    sinks = params.sinks_H.float().view(shape).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]

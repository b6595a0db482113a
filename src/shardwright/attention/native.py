"""Paged attention on a CPU by the native kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.attention.batched import BatchedBackend, BatchedPlan
from shardwright.attention.kv_cache import LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionParams, StepLayout
from shardwright.cache.spec import Visibility
from shardwright.kernels.attention import paged_attention


@dataclass(frozen=True)
class Queries:
    """Sequences of a step, and the positions that their tokens see."""

    starts: npt.NDArray[np.int64]
    """[S + 1]: tokens of each sequence."""
    tables: npt.NDArray[np.int32]
    """[S, max blocks]."""
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    """[T]."""


@dataclass(frozen=True)
class NativePlan(Queries):
    """All of one step and cache group."""

    latents: LatentPlan


@dataclass(frozen=True)
class LatentPlan:
    """What layers that cache latents need instead, made when the first of them is met."""

    batched: BatchedBackend
    layout: StepLayout
    block_tables: npt.NDArray[np.int32]
    visibility: Visibility

    @cached_property
    def is_decode(self) -> npt.NDArray[np.bool_]:
        """[S]."""
        return self.layout.is_decode

    @cached_property
    def decoding(self) -> Tensor:
        """[S] int64: where the decodes' queries stand in the step."""
        return torch.from_numpy(self.layout.query_starts[:-1][self.is_decode])

    @cached_property
    def decodes(self) -> Queries:
        """Of one token each."""
        last = self.layout.num_computed[self.is_decode]
        tables = np.ascontiguousarray(self.block_tables[self.is_decode])
        return Queries(np.arange(len(last) + 1), tables, self.visibility.first_visible_of(last), last)

    @cached_property
    def prompts(self) -> BatchedPlan:
        """Of the other sequences."""
        prompts = np.flatnonzero(~self.is_decode)
        return self.batched.prepare_prompts(self.layout, prompts, self.block_tables, self.visibility)


class NativeBackend:
    """Implements AttentionBackend.

    Args:
        batched: computes the prompts of layers that cache latents.
    """

    def __init__(self, batched: BatchedBackend) -> None:
        self.block_size = batched.block_size
        self.compute_dtype = batched.compute_dtype
        self._batched = batched

    def prepare(self, layout: StepLayout, block_tables: np.ndarray, visibility: Visibility) -> NativePlan:
        offsets = layout.num_computed - layout.query_starts[:-1]
        last = np.arange(layout.query_starts[-1]) + np.repeat(offsets, layout.num_tokens)
        return NativePlan(
            starts=np.ascontiguousarray(layout.query_starts, dtype=np.int64),
            tables=np.ascontiguousarray(block_tables),
            first=visibility.first_visible_of(last),
            last=last,
            latents=LatentPlan(self._batched, layout, block_tables, visibility),
        )

    def write(self, cache: LayerCache, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        cache.write(slot_mapping, key_TKD, value_TKV)

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: NativePlan,
        params: AttentionParams,
    ) -> Tensor:
        return self._attend(query_THD, cache, plan, params)

    def forward_latent(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: NativePlan,
        params: AttentionParams,
        projection: LatentProjection,
    ) -> Tensor:
        latents = plan.latents

        def decode(query_SHD: Tensor) -> Tensor:
            return projection.around(
                lambda query_SHC: self._attend(query_SHC, cache, latents.decodes, params), query_SHD, self.compute_dtype
            )

        if latents.is_decode.all():
            return decode(query_THD)
        output = self._batched.forward_latent(query_THD, key_TKD, value_TKV, cache, latents.prompts, params, projection)
        if len(latents.decoding):
            output[latents.decoding] = decode(query_THD[latents.decoding])
        return output

    def _attend(self, query_THD: Tensor, cache: LayerCache, queries: Queries, params: AttentionParams) -> Tensor:
        return paged_attention(
            query_THD,
            cache.keys_NKD,
            cache.values_NKV,
            queries.starts,
            queries.tables,
            queries.first,
            queries.last,
            block_size=self.block_size,
            scale=params.scale,
            softcap=params.softcap,
            sinks_H=params.sinks_H,
            bias_HN=params.bias_HN,
        )

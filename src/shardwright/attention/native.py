"""Paged attention on a CPU: decodes by the native kernel, prompts by torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.attention.batched import BatchedBackend, BatchedPlan
from shardwright.attention.kv_cache import LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionBackend, AttentionParams, StepLayout
from shardwright.cache.spec import Visibility
from shardwright.kernels.attention import is_available, paged_decode


@dataclass(frozen=True, slots=True)
class NativePlan:
    """Decodes and prompts of one step and cache group."""

    tokens: Tensor | None
    """[S] int64: where the decodes' queries stand in the step; None: the step is all decodes, in order."""
    tables: npt.NDArray[np.int32]
    """[S, max blocks], of the decodes."""
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    """[S]: positions that each decode sees."""
    prompts: BatchedPlan


class NativeBackend:
    """Implements AttentionBackend.

    Args:
        batched: computes the prompts.
    """

    def __init__(self, batched: BatchedBackend) -> None:
        self.block_size = batched.block_size
        self.compute_dtype = batched.compute_dtype
        self._batched = batched

    def prepare(self, layout: StepLayout, block_tables: np.ndarray, visibility: Visibility) -> NativePlan:
        is_decode = (layout.num_tokens == 1) & (layout.num_computed > 0)
        decodes = np.flatnonzero(is_decode)
        last = layout.num_computed[decodes]
        return NativePlan(
            tokens=None if is_decode.all() else torch.from_numpy(layout.query_starts[:-1][decodes]),
            tables=np.ascontiguousarray(block_tables[decodes]),
            first=np.array([visibility.first_visible(p) for p in last.tolist()], dtype=np.int64),
            last=last,
            prompts=self._batched.prepare_prompts(layout, np.flatnonzero(~is_decode), block_tables, visibility),
        )

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: NativePlan,
        params: AttentionParams,
    ) -> Tensor:
        if plan.tokens is None:
            return self._decode(query_THD, cache, plan, params)
        output = self._batched.forward(query_THD, key_TKD, value_TKV, cache, plan.prompts, params)
        if len(plan.tokens):
            output[plan.tokens] = self._decode(query_THD[plan.tokens], cache, plan, params)
        return output

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
        def decode(query_SHD: Tensor) -> Tensor:
            return projection.around(
                lambda query_SHC: self._decode(query_SHC, cache, plan, params), query_SHD, self.compute_dtype
            )

        if plan.tokens is None:
            return decode(query_THD)
        output = self._batched.forward_latent(query_THD, key_TKD, value_TKV, cache, plan.prompts, params, projection)
        if len(plan.tokens):
            output[plan.tokens] = decode(query_THD[plan.tokens])
        return output

    def _decode(self, query_SHD: Tensor, cache: LayerCache, plan: NativePlan, params: AttentionParams) -> Tensor:
        return paged_decode(
            query_SHD,
            cache.keys_NKD,
            cache.values_NKV,
            plan.tables,
            plan.first,
            plan.last,
            block_size=self.block_size,
            scale=params.scale,
            softcap=params.softcap,
            sinks_H=params.sinks_H,
            bias_HN=params.bias_HN,
        )


def make_backend(
    *, block_size: int, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype
) -> AttentionBackend:
    """The best back end here.

    Args:
        block_size: tokens per block.
        device: of model and cache.
        dtype: of queries, keys and values.
        compute_dtype: of products in torch; float32 where the device is slow at `dtype`.
    """
    batched = BatchedBackend(block_size=block_size, device=device, compute_dtype=compute_dtype)
    return NativeBackend(batched) if device.type == "cpu" and is_available(dtype) else batched

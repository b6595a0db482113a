"""Paged attention on a GPU by our Triton kernels; on a CPU by Triton's interpreter, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.attention.arrays import on_device
from shardwright.attention.batched import BatchedBackend, BatchedPlan
from shardwright.attention.kv_cache import LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionParams, StepLayout
from shardwright.cache.spec import Visibility
from shardwright.kernels.triton.attention import Tiles, TileShape, paged_attention, splits_for
from shardwright.kernels.triton.cache_rows import store_rows

INTERPRETED_PROCESSORS = 16
"""Multiprocessors of a device that is none: enough for contexts to be split."""


@dataclass(frozen=True)
class TilePlan:
    """Sequences of a step that are attended to alike: decodes of one token each, or prompts."""

    is_decode: bool
    longest: int
    """Tokens of the longest context."""
    make: Callable[[int], Tiles]
    """Their tokens in tiles of so many."""
    _made: dict[int, Tiles] = field(default_factory=dict)

    def tiles(self, num_queries: int) -> Tiles:
        """What `make` gives, once per step."""
        if num_queries not in self._made:
            self._made[num_queries] = self.make(num_queries)
        return self._made[num_queries]

    @classmethod
    def of_decodes(cls, tiles: Tiles, longest: int) -> TilePlan:
        """A tile for each, whatever it has room for."""
        return cls(True, longest, lambda num_queries: replace(tiles, num_queries=num_queries))


@dataclass(frozen=True)
class TritonPlan:
    """One step and cache group."""

    decodes: TilePlan | None
    prompts: TilePlan | None
    visibility: Visibility
    make_latent_prompts: Callable[[], BatchedPlan]

    @cached_property
    def decoding(self) -> Tensor:
        """[S] int64: where the decodes' queries stand in the step."""
        assert self.decodes is not None
        return self.decodes.tiles(1).token_N.long()

    @cached_property
    def latent_prompts(self) -> BatchedPlan:
        """The prompts, for layers that cache latents: those use keys and values made of them."""
        return self.make_latent_prompts()


class TritonBackend:
    """Implements AttentionBackend.

    Args:
        batched: computes the prompts of layers that cache latents.
        device: of model and cache.
    """

    def __init__(self, batched: BatchedBackend, device: torch.device) -> None:
        self.block_size = batched.block_size
        self.compute_dtype = batched.compute_dtype
        self._batched = batched
        self._device = device
        self._num_processors = INTERPRETED_PROCESSORS
        if device.type == "cuda":
            self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count

    def prepare(self, layout: StepLayout, block_tables: np.ndarray, visibility: Visibility) -> TritonPlan:
        contexts = layout.num_computed + layout.num_tokens
        num_blocks = -(-int(contexts.max(initial=1)) // self.block_size)
        is_decode = layout.is_decode
        sequences = {True: np.flatnonzero(is_decode), False: np.flatnonzero(~is_decode)}
        decoding = tile_arrays(layout, sequences[True], 1)
        tables, starts, computed, decoding_N, decoded_N = on_device(
            [
                block_tables[:, :num_blocks],
                layout.query_starts.astype(np.int32),
                layout.num_computed.astype(np.int32),
                *decoding,
            ],
            self._device,
        )

        def prompt_tiles(num_queries: int) -> Tiles:
            arrays = tile_arrays(layout, sequences[False], num_queries)
            sequence_N, token_N = on_device(arrays, self._device)
            return Tiles(tables, starts, computed, sequence_N, token_N, num_queries)

        decodes = prompts = None
        if len(sequences[True]):
            tiles = Tiles(tables, starts, computed, decoding_N, decoded_N, num_queries=1)
            decodes = TilePlan.of_decodes(tiles, int(contexts[sequences[True]].max()))
        if len(sequences[False]):
            prompts = TilePlan(False, int(contexts[sequences[False]].max()), prompt_tiles)
        return TritonPlan(
            decodes,
            prompts,
            visibility,
            lambda: self._batched.prepare_prompts(layout, sequences[False], block_tables, visibility),
        )

    def prepare_decodes(
        self,
        block_tables: Tensor,
        query_starts: Tensor,
        num_computed: Tensor,
        sequences: Tensor,
        visibility: Visibility,
        *,
        longest: int,
    ) -> TritonPlan:
        """As CapturableBackend has it."""
        tiles = Tiles(block_tables, query_starts, num_computed, sequences, sequences, num_queries=1)
        return TritonPlan(TilePlan.of_decodes(tiles, longest), None, visibility, lambda: BatchedPlan([], []))

    def write(self, cache: LayerCache, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        values_NKV = None if cache.values_in_keys else cache.values_NKV
        store_rows(slot_mapping, key_TKD, value_TKV, cache.keys_NKD, values_NKV)

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: TritonPlan,
        params: AttentionParams,
    ) -> Tensor:
        output_THV = query_THD.new_empty(*query_THD.shape[:2], cache.values_NKV.shape[2])
        for part in (plan.decodes, plan.prompts):
            if part is not None:
                self._attend(query_THD, cache, part, plan.visibility, params, output_THV)
        return output_THV

    def forward_latent(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: LayerCache,
        plan: TritonPlan,
        params: AttentionParams,
        projection: LatentProjection,
    ) -> Tensor:
        decodes = plan.decodes

        def attend(query_THC: Tensor) -> Tensor:
            assert decodes is not None
            output_THR = query_THC.new_empty(*query_THC.shape[:2], projection.latent_dim)
            self._attend(query_THC, cache, decodes, plan.visibility, params, output_THR)
            return output_THR

        if plan.prompts is None:
            return projection.around(attend, query_THD, self.compute_dtype)
        output = self._batched.forward_latent(
            query_THD, key_TKD, value_TKV, cache, plan.latent_prompts, params, projection
        )
        if decodes is not None:
            # Rows of prompts go through the projections in vain: fewer launches than picking the others out.
            made = projection.around(attend, query_THD, self.compute_dtype)
            output[plan.decoding] = made[plan.decoding]
        return output

    def _attend(
        self,
        query_THD: Tensor,
        cache: LayerCache,
        part: TilePlan,
        visibility: Visibility,
        params: AttentionParams,
        output_THV: Tensor,
    ) -> None:
        num_kv_heads, value_dim = cache.values_NKV.shape[1:]
        group = query_THD.shape[1] // num_kv_heads
        shape = TileShape.of(
            group=group,
            key_dim=query_THD.shape[2],
            value_dim=value_dim,
            dtype=query_THD.dtype,
            is_decode=part.is_decode,
            values_in_keys=cache.values_in_keys,
        )
        tiles = part.tiles(shape.num_queries)
        num_splits = splits_for(
            num_tiles=len(tiles.token_N),
            num_kv_heads=num_kv_heads,
            group=group,
            shape=shape,
            longest=part.longest,
            num_processors=self._num_processors,
        )
        paged_attention(
            query_THD,
            cache.keys_NKD,
            cache.values_NKV,
            tiles,
            output_THV,
            shape=shape,
            num_splits=num_splits,
            block_size=self.block_size,
            visibility=visibility.kind.value,
            window=visibility.size,
            scale=params.scale,
            softcap=params.softcap,
            sinks_H=params.sinks_H,
            bias_HN=params.bias_HN,
            values_in_keys=cache.values_in_keys,
        )


def tile_arrays(
    layout: StepLayout, sequences: npt.NDArray[np.int64], num_queries: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Tiles of up to `num_queries` tokens of some sequences: whose they are, and the first token of each."""
    counts = -(-layout.num_tokens[sequences] // num_queries)
    sequence_N = np.repeat(sequences, counts)
    within = np.arange(len(sequence_N)) - np.repeat(np.cumsum(counts) - counts, counts)
    token_N = layout.query_starts[:-1][sequence_N] + within * num_queries
    return sequence_N.astype(np.int32), token_N.astype(np.int32)

"""The native back end against the reference: one query and several, in one step and apart."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.steps import random_bias

from shardwright.attention.batched import BatchedBackend
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionParams, StepLayout
from shardwright.attention.native import NativeBackend
from shardwright.attention.reference import ReferenceBackend
from shardwright.cache.spec import LayerSpec, Visibility, VisibilityKind, group_layers
from shardwright.kernels.attention import is_available

CPU = torch.device("cpu")
LONG = st.sampled_from([510, 511, 512, 1023, 1300])
"""Contexts of one query that are, with it, about one piece of positions (native/decode.h), two, or three."""
VISIBILITIES = [Visibility(), Visibility(VisibilityKind.SLIDING, 5), Visibility(VisibilityKind.CHUNKED, 6)]


def test_the_kernel_compiles_here() -> None:
    assert is_available(torch.float32)
    assert is_available(torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 4) | st.integers(1, 50)) | st.tuples(LONG, st.just(1)),
        min_size=1,
        max_size=4,
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 40) | st.just(64), st.integers(1, 40) | st.sampled_from([80, 160])),
    block_size=st.integers(1, 8),
    visibility=st.sampled_from(VISIBILITIES),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    num_distances=st.just(0) | st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    sequences: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    dims: tuple[int, int],
    block_size: int,
    visibility: Visibility,
    softcap: float | None,
    has_sinks: bool,
    num_distances: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    key_dim, value_dim = dims
    layers = [LayerSpec("layer", kv_heads * group, kv_heads, key_dim, value_dim, visibility)]
    num_computed, num_tokens = (np.array(column, dtype=np.int64) for column in zip(*sequences, strict=True))
    blocks_of = -(-(num_computed + num_tokens) // block_size)
    cache = KVCache(
        layers, group_layers(layers), num_blocks=int(blocks_of.sum()), block_size=block_size, dtype=dtype, device=CPU
    )
    layer = cache.layers[0]
    layer.keys_NKD.normal_(generator=generator)
    layer.values_NKV.normal_(generator=generator)
    tables = np.zeros((len(sequences), int(blocks_of.max())), dtype=np.int32)
    order, start = np.random.default_rng(seed).permutation(int(blocks_of.sum())) + 1, 0
    for row, count in enumerate(blocks_of.tolist()):
        tables[row, :count] = order[start : start + count]
        start += count
    query_starts = np.concatenate([[0], num_tokens.cumsum()])
    layout = StepLayout(num_computed, num_tokens, query_starts)
    total = int(query_starts[-1])
    query = torch.randn(total, kv_heads * group, key_dim, generator=generator).to(dtype)
    keys = torch.randn(total, kv_heads, key_dim, generator=generator).to(dtype)
    values = torch.randn(total, kv_heads, value_dim, generator=generator).to(dtype)
    rows = np.repeat(np.arange(len(sequences)), num_tokens)
    positions = np.arange(total) + np.repeat(num_computed - query_starts[:-1], num_tokens)
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    layer.write(torch.from_numpy(slots), keys, values)
    sinks = torch.randn(kv_heads * group, generator=generator) if has_sinks else None
    bias = random_bias(kv_heads * group, num_distances, seed)
    params = AttentionParams(scale=0.3, softcap=softcap, sinks_H=sinks, bias_HN=bias)

    outputs = []
    batched = BatchedBackend(block_size=block_size, device=CPU, compute_dtype=torch.float32)
    for backend in (NativeBackend(batched), ReferenceBackend(block_size=block_size)):
        plan = backend.prepare(layout, tables, visibility)
        outputs.append(backend.forward(query, keys, values, layer, plan, params).float())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)


def test_a_mean_of_two_values_is_rounded_to_the_nearest_even() -> None:
    """Scores of a query of zeros are all the same, and the sum of two such values is exact in float32."""
    layers = [LayerSpec("layer", 3, 1, 8, 165, Visibility())]
    cache = KVCache(layers, group_layers(layers), num_blocks=1, block_size=4, dtype=torch.bfloat16, device=CPU)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 1, 8, generator=generator).bfloat16()
    values = (torch.randn(2, 1, 165, generator=generator) * 4).bfloat16()
    cache.layers[0].write(torch.tensor([4, 5]), keys, values)
    backend = NativeBackend(BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.float32))
    layout = StepLayout(np.array([1]), np.array([1]), np.array([0, 1]))
    plan = backend.prepare(layout, np.array([[1]], dtype=np.int32), Visibility())
    query = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    output = backend.forward(query, keys[1:], values[1:], cache.layers[0], plan, AttentionParams(scale=1.0))
    mean = (values.float().sum(0) * 0.5).bfloat16()
    assert torch.equal(output.view(3, 165), mean.expand(3, 165))

"""Attention on cached latents gives what attention on the keys and values made of them gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.steps import attention_by_hand, make_latent_step, random_bias, random_projection

from shardwright.attention import latent as latent_module
from shardwright.attention.batched import BatchedBackend
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionBackend, AttentionParams
from shardwright.attention.native import NativeBackend
from shardwright.attention.reference import ReferenceBackend
from shardwright.cache.spec import Visibility, VisibilityKind

CPU = torch.device("cpu")
FULL = Visibility()
META = torch.empty(128, 128, 512, device="meta")
DEEPSEEK = LatentProjection(META, META, slice(128, 192))
SHARED = {"first": slice(0, 2), "last": slice(3, 5), "none": slice(3, 3)}
SEQUENCES = [(0, 7), (5, 1), (9, 4), (0, 1)]
VISIBILITIES = [FULL, Visibility(VisibilityKind.SLIDING, 4), Visibility(VisibilityKind.CHUNKED, 5)]


def batched(dtype: torch.dtype = torch.float32) -> BatchedBackend:
    return BatchedBackend(block_size=4, device=CPU, compute_dtype=dtype)


@pytest.mark.parametrize("visibility", VISIBILITIES, ids=lambda v: v.kind.value)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("has_extras", [False, True])
def test_reference_equals_attention_by_hand(visibility: Visibility, shared: str, has_extras: bool) -> None:
    projection = random_projection(2, 3, SHARED[shared], value_dim=4, latent_dim=6)
    step = make_latent_step(SEQUENCES, projection, group=2, block_size=4, visibility=visibility)
    params = AttentionParams(scale=0.7)
    if has_extras:
        params = AttentionParams(scale=0.7, softcap=2.0, sinks_H=torch.linspace(-1, 2, 4), bias_HN=random_bias(4, 3))
    actual = step.run(ReferenceBackend(block_size=4), visibility, params)
    torch.testing.assert_close(actual.double(), attention_by_hand(step, visibility, params), atol=1e-5, rtol=1e-5)


lengths = st.integers(1, 12) | st.integers(1, 100)
steps = st.lists(
    st.tuples(lengths, st.just(1)) | st.tuples(st.just(0), st.integers(1, 40)) | st.tuples(lengths, st.integers(2, 60)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    sequences=steps,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dims=st.tuples(*[st.sampled_from([1, 3, 8, 17])] * 3),
    num_shared=st.sampled_from([0, 1, 8]),
    shared_is_first=st.booleans(),
    visibility=st.sampled_from(VISIBILITIES),
    softcap=st.none() | st.just(3.0),
    has_sinks=st.booleans(),
    num_distances=st.just(0) | st.integers(1, 120),
    is_native=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_back_ends_equal_the_reference(
    sequences: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    dims: tuple[int, int, int],
    num_shared: int,
    shared_is_first: bool,
    visibility: Visibility,
    softcap: float | None,
    has_sinks: bool,
    num_distances: int,
    is_native: bool,
    seed: int,
) -> None:
    own_dim, value_dim, latent_dim = dims
    shared = slice(0, num_shared) if shared_is_first else slice(own_dim, own_dim + num_shared)
    projection = random_projection(num_kv_heads, own_dim, shared, value_dim, latent_dim)
    step = make_latent_step(sequences, projection, group=group, block_size=4, visibility=visibility, seed=seed)
    num_heads = num_kv_heads * group
    sinks = torch.linspace(-1, 2, num_heads) if has_sinks else None
    bias = random_bias(num_heads, num_distances, seed)
    params = AttentionParams(scale=0.4, softcap=softcap, sinks_H=sinks, bias_HN=bias)
    backend: AttentionBackend = NativeBackend(batched()) if is_native else batched()
    expected = step.run(ReferenceBackend(block_size=4), visibility, params)
    torch.testing.assert_close(step.run(backend, visibility, params), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_native", [False, True])
def test_half_precision_stays_close(compute_dtype: torch.dtype, is_native: bool) -> None:
    projection = random_projection(2, 3, SHARED["last"], value_dim=4, latent_dim=6, dtype=torch.bfloat16)
    step = make_latent_step([(0, 20), (50, 1), (3, 1), (18, 5)], projection, group=2, block_size=4, visibility=FULL)
    backend: AttentionBackend = NativeBackend(batched(compute_dtype)) if is_native else batched(compute_dtype)
    params = AttentionParams(scale=0.3)
    actual = step.run(backend, FULL, params)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, step.run(ReferenceBackend(block_size=4), FULL, params), atol=3e-2, rtol=3e-2)


def test_long_chunks_are_expanded_and_short_ones_are_not() -> None:
    """A head multiplies T (1088 L + 131,072) numbers absorbed, and L (320 T + 131,072) expanded."""
    assert DEEPSEEK.row_dim == 576
    assert not DEEPSEEK.pays_to_expand(num_queries=145, context=1000)
    assert DEEPSEEK.pays_to_expand(num_queries=146, context=1000)
    assert not DEEPSEEK.pays_to_expand(num_queries=1, context=2)


def test_contexts_that_do_not_fit_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_module, "MAX_EXPANDED_BYTES", 1000 * 128 * (128 + 64 + 128) * 4)
    assert DEEPSEEK.pays_to_expand(num_queries=512, context=1000)
    assert not DEEPSEEK.pays_to_expand(num_queries=512, context=1001)


@pytest.mark.parametrize("expands", [False, True])
def test_both_ways_give_the_same(monkeypatch: pytest.MonkeyPatch, expands: bool) -> None:
    projection = random_projection(2, 3, SHARED["first"], value_dim=4, latent_dim=6)
    step = make_latent_step([(9, 4), (30, 20)], projection, group=1, block_size=4, visibility=FULL)
    monkeypatch.setattr(LatentProjection, "pays_to_expand", lambda self, **_: expands)
    params = AttentionParams(scale=0.7)
    actual = step.run(batched(), FULL, params).double()
    torch.testing.assert_close(actual, attention_by_hand(step, FULL, params), atol=1e-5, rtol=1e-5)


def test_another_type_is_made_once() -> None:
    projection = random_projection(2, 3, SHARED["last"], value_dim=4, latent_dim=6, dtype=torch.bfloat16)
    assert projection.to(torch.bfloat16) is projection
    assert projection.to(torch.float32) is projection.to(torch.float32)

"""The Triton back end against the reference, by Triton's interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.steps import Heads, make_latent_step, make_step, random_bias, random_projection

from shardwright.attention.batched import BatchedBackend
from shardwright.attention.kv_cache import FLOAT8, LayerCache, stored
from shardwright.attention.layout import AttentionParams
from shardwright.attention.reference import ReferenceBackend
from shardwright.attention.triton import TritonBackend
from shardwright.cache.spec import Visibility, VisibilityKind

CPU = torch.device("cpu")
VISIBILITIES = [Visibility(), Visibility(VisibilityKind.SLIDING, 7), Visibility(VisibilityKind.CHUNKED, 9)]

lengths = st.integers(1, 20) | st.integers(60, 300)
sequences = st.lists(
    st.tuples(lengths, st.just(1)) | st.tuples(st.just(0), st.integers(1, 40)) | st.tuples(lengths, st.integers(2, 40)),
    min_size=1,
    max_size=3,
)
extras = st.fixed_dictionaries(
    {
        "visibility": st.sampled_from(VISIBILITIES),
        "softcap": st.sampled_from([None, 3.0]),
        "has_sinks": st.booleans(),
        "num_distances": st.just(0) | st.integers(1, 70),
    }
)
DTYPES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""And what rounding explains."""


def backend(block_size: int) -> TritonBackend:
    return TritonBackend(BatchedBackend(block_size=block_size, device=CPU, compute_dtype=torch.float32), CPU)


def parameters(num_heads: int, *, softcap: float | None, has_sinks: bool, num_distances: int) -> AttentionParams:
    return AttentionParams(
        scale=0.3,
        softcap=softcap,
        sinks_H=torch.linspace(-1, 3, num_heads) if has_sinks else None,
        bias_HN=random_bias(num_heads, num_distances),
    )


def check(
    sequences: list[tuple[int, int]],
    heads: Heads,
    *,
    block_size: int,
    visibility: Visibility,
    dtype: torch.dtype,
    seed: int = 0,
    **extras: Any,
) -> None:
    step = make_step(sequences, heads, block_size=block_size, visibility=visibility, dtype=dtype, seed=seed)
    params = parameters(heads.num_kv_heads * heads.group, **extras)
    expected = step.run(ReferenceBackend(block_size=block_size), visibility, params)
    actual = step.run(backend(block_size), visibility, params)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual, expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


heads = st.builds(
    Heads,
    num_kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 7, 20]),
    key_dim=st.sampled_from([3, 16, 24, 80, 96]),
    value_dim=st.sampled_from([3, 16, 40, 64]),
)
drawn = given(
    sequences=sequences,
    heads=heads,
    block_size=st.sampled_from([1, 4, 5, 16]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 1000),
    extras=extras,
)


@settings(max_examples=5, deadline=None)
@drawn
def test_equals_the_reference(extras: dict[str, Any], **step: Any) -> None:
    check(**step, **extras)


@pytest.mark.sweep
@settings(max_examples=400, deadline=None)
@drawn
def test_equals_the_reference_in_many_shapes(extras: dict[str, Any], **step: Any) -> None:
    check(**step, **extras)


def test_everything_at_once_in_one_step() -> None:
    """Decodes whose contexts are split, chunks of prompts and whole ones, seven query heads for a KV head."""
    check(
        [(400, 1), (0, 20), (70, 18), (2, 1)],
        Heads(1, 7, 24, 12),
        block_size=5,
        visibility=Visibility(VisibilityKind.SLIDING, 300),
        dtype=torch.bfloat16,
        softcap=3.0,
        has_sinks=True,
        num_distances=50,
    )


@settings(max_examples=4, deadline=None)
@given(
    sequences=sequences,
    shared_is_first=st.booleans(),
    group=st.sampled_from([1, 3]),
    latent_dim=st.sampled_from([16, 24]),
    extras=extras,
)
def test_latents_equal_the_reference(
    sequences: list[tuple[int, int]], shared_is_first: bool, group: int, latent_dim: int, extras: dict[str, Any]
) -> None:
    """Latents of 16 are read once, as keys and values, those of 24 twice."""
    shared = slice(0, 8) if shared_is_first else slice(5, 13)
    projection = random_projection(2, 5, shared, value_dim=6, latent_dim=latent_dim)
    visibility = extras.pop("visibility")
    step = make_latent_step(sequences, projection, group=group, block_size=4, visibility=visibility)
    params = parameters(2 * group, **extras)
    expected = step.run(ReferenceBackend(block_size=4), visibility, params)
    torch.testing.assert_close(step.run(backend(4), visibility, params), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_8_bits_are_read_as_the_reference_reads_them(dtype: torch.dtype) -> None:
    step = make_step(
        [(70, 1), (0, 20), (9, 3)], Heads(2, 3, 24, 12), block_size=5, visibility=Visibility(), dtype=dtype
    )
    rows = (stored(rows, FLOAT8) for rows in (step.layer.keys_NKD, step.layer.values_NKV))
    step = dataclasses.replace(step, layer=LayerCache(*rows, block_size=5))
    params = parameters(6, softcap=None, has_sinks=True, num_distances=0)
    expected = step.run(ReferenceBackend(block_size=5), Visibility(), params)
    actual = step.run(backend(5), Visibility(), params)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual, expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


def test_what_nobody_sees_may_be_anything() -> None:
    """Not-a-number before a window and after the last token changes nothing: its weight is not zero, it is not read."""
    visibility = Visibility(VisibilityKind.SLIDING, 3)
    step = make_step([(9, 1), (0, 6)], Heads(1, 2, 16, 16), block_size=4, visibility=visibility)
    expected = step.run(backend(4), visibility, AttentionParams(scale=0.3))
    seen = {int(step.block_tables[0, place // 4]) * 4 + place % 4 for place in (7, 8, 9)}
    seen |= {int(step.block_tables[1, place // 4]) * 4 + place % 4 for place in range(6)}
    unseen = [slot for slot in range(len(step.layer.keys_NKD)) if slot not in seen]
    step.layer.keys_NKD[unseen] = step.layer.values_NKV[unseen] = float("nan")
    assert torch.equal(step.run(backend(4), visibility, AttentionParams(scale=0.3)), expected)

"""The back end for every device gives what the reference gives, whatever lies in a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.steps import Heads, make_step, random_bias

from shardwright.attention import batched
from shardwright.attention.batched import BatchedBackend
from shardwright.attention.layout import AttentionParams
from shardwright.attention.reference import ReferenceBackend
from shardwright.cache.spec import Visibility, VisibilityKind

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-3, 2**-7)}

lengths = st.integers(1, 12) | st.integers(1, 300)
decodes = st.tuples(lengths, st.just(1))
fresh_prompts = st.tuples(st.just(0), st.integers(1, 40))
later_chunks = st.tuples(lengths, st.integers(2, 20))
steps = st.lists(decodes | fresh_prompts | later_chunks, min_size=1, max_size=6)
heads = st.builds(
    Heads,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    key_dim=st.sampled_from([1, 3, 8, 17, 32]),
    value_dim=st.sampled_from([1, 3, 8, 17, 32]),
)
visibilities = st.just(Visibility()) | st.builds(
    Visibility, st.sampled_from([VisibilityKind.SLIDING, VisibilityKind.CHUNKED]), st.integers(1, 40)
)


@settings(max_examples=120, deadline=None)
@given(
    sequences=steps,
    heads=heads,
    visibility=visibilities,
    block_size=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.none() | st.sampled_from([0.5, 20.0]),
    has_sinks=st.booleans(),
    num_distances=st.just(0) | st.integers(1, 320),
    seed=st.integers(0, 1000),
)
def test_batched_equals_reference(
    sequences: list[tuple[int, int]],
    heads: Heads,
    visibility: Visibility,
    block_size: int,
    dtype: torch.dtype,
    softcap: float | None,
    has_sinks: bool,
    num_distances: int,
    seed: int,
) -> None:
    step = make_step(sequences, heads, block_size=block_size, visibility=visibility, dtype=dtype, seed=seed)
    num_heads = heads.num_kv_heads * heads.group
    sinks = torch.linspace(-1, 2, num_heads) if has_sinks else None
    bias = random_bias(num_heads, num_distances, seed)
    params = AttentionParams(scale=heads.key_dim**-0.5, softcap=softcap, sinks_H=sinks, bias_HN=bias)
    backend = BatchedBackend(block_size=block_size, device=CPU, compute_dtype=torch.float32)
    actual = step.run(backend, visibility, params)
    expected = step.run(ReferenceBackend(block_size=block_size), visibility, params)
    assert actual.dtype is dtype
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


SMALL = Heads(num_kv_heads=2, group=2, key_dim=8, value_dim=6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_products_in_half_precision_stay_close(softcap: float | None) -> None:
    sequences = [(0, 20), (50, 1), (3, 1), (18, 5)]
    step = make_step(sequences, SMALL, block_size=4, visibility=Visibility(), dtype=torch.bfloat16)
    backend = BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.bfloat16)
    params = AttentionParams(scale=0.3, softcap=softcap)
    expected = step.run(ReferenceBackend(block_size=4), Visibility(), params)
    torch.testing.assert_close(step.run(backend, Visibility(), params), expected, atol=3e-2, rtol=3e-2)


def test_short_and_long_contexts_are_gathered_apart() -> None:
    sequences = [(900, 1), (20, 1), (7, 1), (400, 1), (60, 1)]
    step = make_step(sequences, SMALL, block_size=4, visibility=Visibility())
    backend = BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.float32)
    plan = backend.prepare(step.layout, step.block_tables, Visibility())
    assert len(plan.decodes) > 1
    assert sum(len(piece.tokens) for piece in plan.decodes) == len(sequences)
    gathered = sum(len(piece.blocks) for piece in plan.decodes)
    assert gathered <= 2 * sum(computed // 4 + 1 for computed, _ in sequences)
    params = AttentionParams(scale=0.3)
    expected = step.run(ReferenceBackend(block_size=4), Visibility(), params)
    torch.testing.assert_close(step.run(backend, Visibility(), params), expected)


def test_window_bounds_what_a_decode_gathers() -> None:
    visibility = Visibility(VisibilityKind.SLIDING, 16)
    step = make_step([(1000, 1)], SMALL, block_size=4, visibility=visibility)
    backend = BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.float32)
    plan = backend.prepare(step.layout, step.block_tables, visibility)
    assert len(plan.decodes[0].blocks) <= 5


@pytest.mark.parametrize("num_distances", [0, 20])
def test_long_prompts_are_cut_by_queries_without_a_trace(monkeypatch: pytest.MonkeyPatch, num_distances: int) -> None:
    step = make_step([(0, 30), (11, 25)], SMALL, block_size=4, visibility=Visibility())
    backend = BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.float32)
    params = AttentionParams(scale=0.3, softcap=1.0, bias_HN=random_bias(4, num_distances))
    whole = step.run(backend, Visibility(), params)
    monkeypatch.setattr(batched, "MAX_SCORE_BYTES", 4 * 4 * 30 * 7)  # seven queries of the first prompt
    torch.testing.assert_close(step.run(backend, Visibility(), params), whole)

"""Keys and values are written where LayerCache.write puts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.attention.kv_cache import LayerCache
from shardwright.kernels.triton import cache_rows
from shardwright.kernels.triton.cache_rows import store_rows


def random_cache(num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> LayerCache:
    """Of 24 slots, rows with gaps between them as in lanes that other layers use too."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        torch.randn(24, num_kv_heads * dim + 3, generator=generator).to(dtype)[:, : num_kv_heads * dim]
        for dim in (key_dim, value_dim)
    )
    return LayerCache(keys.unflatten(1, (num_kv_heads, key_dim)), values.unflatten(1, (num_kv_heads, value_dim)), 4)


@settings(max_examples=15, deadline=None)
@given(
    num_tokens=st.integers(0, 9),
    num_kv_heads=st.integers(1, 5),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    is_transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    num_tokens: int,
    num_kv_heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    is_transposed: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(24, generator=generator)[:num_tokens]
    shape = (num_kv_heads, num_tokens) if is_transposed else (num_tokens, num_kv_heads)
    key, value = (torch.randn(*shape, dim, generator=generator).to(dtype) for dim in dims)
    if is_transposed:
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    expected, actual = (random_cache(num_kv_heads, *dims, dtype) for _ in range(2))
    expected.write(slots, key, value)
    store_rows(slots, key, value, actual.keys_NKD, actual.values_NKV)
    assert torch.equal(actual.keys_NKD, expected.keys_NKD)
    assert torch.equal(actual.values_NKV, expected.values_NKV)


def test_heads_that_do_not_fit_one_program_are_dealt_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_rows, "MOST_NUMBERS", 16)
    cache, expected = (random_cache(5, 8, 6, torch.float32) for _ in range(2))
    key, value = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    expected.write(torch.tensor([7, 0, 20]), key, value)
    store_rows(torch.tensor([7, 0, 20]), key, value, cache.keys_NKD, cache.values_NKV)
    assert torch.equal(cache.keys_NKD, expected.keys_NKD)
    assert torch.equal(cache.values_NKV, expected.values_NKV)


def test_where_keys_hold_the_values_these_are_not_written() -> None:
    keys = torch.zeros(8, 1, 6)
    cache = LayerCache(keys, keys[..., :4], 4, values_in_keys=True)
    rows = torch.randn(2, 1, 6)
    store_rows(torch.tensor([1, 5]), rows, rows[..., :4] + 1, cache.keys_NKD, None)
    assert torch.equal(keys[[1, 5]], rows)
    assert not keys[[0, 2, 3, 4, 6, 7]].any()


def test_numbers_of_8_bits_are_those_of_torch() -> None:
    """Of all bfloat16 numbers and of float32 numbers next to each place where rounding turns."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    turns = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(turns, turns * 0 + bound) for bound in (-1, 1000)]
    numbers = torch.cat([every[~every.isnan()], turns, -turns, *near, torch.tensor([float("nan")])])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 2048)).view(-1, 1, 2048)
    expected, actual = (torch.zeros(len(numbers), 1, 2048, dtype=torch.float8_e4m3fn) for _ in range(2))
    slots = torch.arange(len(numbers))
    LayerCache(expected, expected, 4, values_in_keys=True).write(slots, numbers, numbers)
    store_rows(slots, numbers, numbers, actual, None)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))

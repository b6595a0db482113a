"""Storage: layers of different shapes share lanes without touching each other's blocks."""

from __future__ import annotations

import pytest
import torch

from shardwright.attention.kv_cache import FLOAT8, KVCache
from shardwright.cache.spec import LayerSpec, Visibility, VisibilityKind, group_layers, lane_elements

BLOCK_SIZE = 4
WINDOW = Visibility(VisibilityKind.SLIDING, 8)
LAYERS = [
    LayerSpec("a", num_heads=4, num_kv_heads=2, key_dim=8, value_dim=8, visibility=WINDOW),
    LayerSpec("b", num_heads=4, num_kv_heads=1, key_dim=32, value_dim=4),
    LayerSpec("c", num_heads=6, num_kv_heads=3, key_dim=5, value_dim=7, visibility=WINDOW),
    LayerSpec("d", num_heads=1, num_kv_heads=1, key_dim=3, value_dim=40),
    LayerSpec("e", num_heads=4, num_kv_heads=1, key_dim=12, value_dim=9, values_in_keys=True),
]


def make_cache(num_blocks: int = 10, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(
        LAYERS, group_layers(LAYERS), num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip


def slots(block: int) -> torch.Tensor:
    return torch.arange(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)


def test_layers_that_share_lanes_do_not_overlap() -> None:
    cache = make_cache()
    assert len({group for group in cache.group_of_layer}) < len(LAYERS), "the test wants layers beside each other"
    written = {}
    for index, (spec, layer) in enumerate(zip(LAYERS, cache.layers, strict=True)):
        for block in (1 + 2 * cache.group_of_layer[index], 2 + 2 * cache.group_of_layer[index]):
            keys = torch.randn(BLOCK_SIZE, spec.num_kv_heads, spec.key_dim)
            values = torch.randn(BLOCK_SIZE, spec.num_kv_heads, spec.value_dim)
            if spec.values_in_keys:
                values = keys[..., : spec.value_dim]
            layer.write(slots(block), keys, values)
            written[index, block] = keys, values
    for (index, block), (keys, values) in written.items():
        read_keys, read_values = cache.layers[index].gather(torch.tensor([block]))
        torch.testing.assert_close(read_keys, keys, rtol=0, atol=0)
        torch.testing.assert_close(read_values, values, rtol=0, atol=0)


def test_gather_gives_whole_blocks_in_the_order_asked_for() -> None:
    layer = make_cache().layers[0]
    for block in (1, 2, 3):
        layer.write(slots(block), torch.full((4, 2, 8), float(block)), torch.full((4, 2, 8), float(-block)))
    keys, values = layer.gather(torch.tensor([3, 1]))
    assert keys[:, 0, 0].tolist() == [3.0] * 4 + [1.0] * 4
    assert values[:, 1, 7].tolist() == [-3.0] * 4 + [-1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
def test_scrub_mends_the_blocks_named_and_no_others(dtype: torch.dtype) -> None:
    cache = make_cache(dtype=dtype)
    for block in (1, 2):
        keys, values = torch.ones(4, 2, 8), torch.ones(4, 2, 8)
        keys[1, 0, 3], values[2, 1, 5] = float("nan"), float("inf")
        cache.layers[0].write(slots(block), keys, values)
    cache.scrub(torch.tensor([2]))
    keys, values = cache.layers[0].gather(torch.tensor([2]))
    assert keys.float().isfinite().all()
    assert values.float().isfinite().all()
    assert keys[0, 0, 0] == 1
    assert cache.layers[0].gather(torch.tensor([1]))[0].float().isnan().sum() == 1


def test_in_8_bits_large_numbers_are_the_largest() -> None:
    cache = make_cache(dtype=FLOAT8)
    keys = torch.tensor([1000.0, -1000.0, 1.06, 0.0]).repeat(4)[None].expand(4, -1).reshape(4, 2, 8)
    cache.layers[0].write(slots(1), keys, -keys)
    stored_keys, stored_values = cache.layers[0].gather(torch.tensor([1]))
    assert stored_keys[0, 0, :4].tolist() == [448, -448, 1, 0]
    assert torch.equal(stored_values.float(), -stored_keys.float())


def test_random_numbers_fill_a_cache_of_8_bits() -> None:
    cache = make_cache(dtype=FLOAT8)
    cache.fill(seed=0)
    numbers = cache.layers[0].gather(torch.arange(10))[0].float()
    assert numbers.isfinite().all()
    assert 0.9 < numbers.std() < 1.1


def test_a_cache_of_latents_alone_has_no_memory_for_values() -> None:
    latent = LAYERS[-1]
    assert latent.elements_per_token == 12
    assert lane_elements([latent], group_layers([latent])) == [(12, 0)]
    cache = KVCache(
        [latent], group_layers([latent]), num_blocks=2, block_size=BLOCK_SIZE, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    layer = cache.layers[0]
    assert layer.values_NKV.data_ptr() == layer.keys_NKD.data_ptr()
    layer.write(slots(1), torch.full((4, 1, 12), float("nan")), torch.zeros(4, 1, 9))
    cache.scrub(torch.tensor([1]))
    assert layer.gather(torch.tensor([1]))[1].eq(0).all()

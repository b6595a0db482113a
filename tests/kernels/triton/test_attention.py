"""How work is cut, and splits that are added up."""

from __future__ import annotations

import pytest
import torch
from tests.attention.steps import Heads, make_step

from shardwright.attention.layout import AttentionParams
from shardwright.attention.reference import ReferenceBackend
from shardwright.attention.triton import tile_arrays
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.kernels.triton.attention import Tiles, TileShape, key_parts, paged_attention, splits_for

FULL = Visibility()


@pytest.mark.parametrize(
    ("num_splits", "num_queries", "visibility"),
    [(1, 1, FULL), (4, 1, FULL), (2, 4, Visibility(VisibilityKind.SLIDING, 20))],
)
def test_splits_add_up(num_splits: int, num_queries: int, visibility: Visibility) -> None:
    """Parts of contexts shorter than the number of splits are empty."""
    step = make_step([(69, 1), (3, 1), (40, 3)], Heads(2, 3, 8, 4), block_size=4, visibility=visibility)
    params = AttentionParams(scale=0.5, softcap=2.0, sinks_H=torch.linspace(-2, 2, 6))
    layout = step.layout
    sequence_N, token_N = (
        torch.from_numpy(array) for array in tile_arrays(layout, torch.arange(3).numpy(), num_queries)
    )
    tiles = Tiles(
        torch.from_numpy(step.block_tables),
        torch.from_numpy(layout.query_starts).int(),
        torch.from_numpy(layout.num_computed).int(),
        sequence_N,
        token_N,
        num_queries,
    )
    output = torch.full((5, 6, 4), float("nan"))
    paged_attention(
        step.query,
        step.layer.keys_NKD,
        step.layer.values_NKV,
        tiles,
        output,
        shape=TileShape(num_queries, num_heads=4 if num_queries == 1 else 2, num_keys=16, num_warps=1, num_stages=1),
        num_splits=num_splits,
        block_size=4,
        visibility=visibility.kind.value,
        window=visibility.size,
        scale=params.scale,
        softcap=params.softcap,
        sinks_H=params.sinks_H,
        bias_HN=None,
        values_in_keys=False,
    )
    expected = step.run(ReferenceBackend(block_size=4), visibility, params)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def shape(
    group: int, key_dim: int, value_dim: int, *, is_decode: bool, dtype: torch.dtype = torch.bfloat16
) -> TileShape:
    return TileShape.of(
        group=group,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        is_decode=is_decode,
        values_in_keys=key_dim == 576,
    )


def test_a_tile_holds_queries_and_the_heads_that_share_their_keys() -> None:
    prompt = shape(4, 128, 128, is_decode=False)
    assert (prompt.num_queries, prompt.num_heads, prompt.num_keys) == (16, 4, 64)
    alone = shape(1, 64, 64, is_decode=True)
    assert (alone.num_queries, alone.num_heads) == (16, 1)
    latent = shape(128, 576, 512, is_decode=True)
    assert (latent.num_queries, latent.num_heads, latent.num_keys) == (1, 32, 32)
    assert shape(4, 256, 256, is_decode=False, dtype=torch.float32).num_keys == 16


def test_contexts_are_split_where_processors_would_idle() -> None:
    def splits(num_tiles: int, longest: int) -> int:
        one = shape(4, 128, 128, is_decode=True)
        return splits_for(num_tiles=num_tiles, num_kv_heads=8, group=4, shape=one, longest=longest, num_processors=132)

    assert splits(1, 8192) == 32
    assert splits(1, 100) == 1
    assert splits(1, 1000) == 8
    assert splits(8, 8192) == 4
    assert splits(256, 8192) == 1


def test_keys_are_read_in_two_powers_of_two() -> None:
    assert [key_parts(dim) for dim in (576, 128, 96, 80, 40, 3)] == [
        (512, 64),
        (128, 0),
        (64, 32),
        (64, 16),
        (32, 16),
        (16, 0),
    ]

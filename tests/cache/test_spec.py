"""Grouping of layers and what sequences cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cache.spec import (
    CacheGroup,
    LayerSpec,
    Visibility,
    VisibilityKind,
    blocks_for_sequence,
    bytes_per_block,
    group_layers,
    lane_elements,
)

FULL = Visibility()
SLIDING = Visibility(VisibilityKind.SLIDING, 8)
CHUNKED = Visibility(VisibilityKind.CHUNKED, 8)


def layer(visibility: Visibility = FULL, *, kv_heads: int = 2, dim: int = 4) -> LayerSpec:
    return LayerSpec("layer", 4, kv_heads, dim, dim, visibility)


@pytest.mark.parametrize(
    ("visibility", "position", "first"),
    [
        (FULL, 100, 0),
        (SLIDING, 3, 0),
        (SLIDING, 7, 0),
        (SLIDING, 8, 1),
        (CHUNKED, 7, 0),
        (CHUNKED, 8, 8),
        (CHUNKED, 15, 8),
    ],
)
def test_first_visible(visibility: Visibility, position: int, first: int) -> None:
    assert visibility.first_visible(position) == first


def test_layers_alike_form_one_group() -> None:
    assert group_layers([layer()] * 5) == [CacheGroup(FULL, (0, 1, 2, 3, 4))]


def test_interleaved_layers_form_groups_of_about_equal_size() -> None:
    groups = group_layers([layer(SLIDING), layer(SLIDING), layer(SLIDING), layer(FULL)] * 2)
    assert groups == [CacheGroup(SLIDING, (0, 1, 2)), CacheGroup(SLIDING, (4, 5, 6)), CacheGroup(FULL, (3, 7))]


@given(st.lists(st.sampled_from([FULL, SLIDING, CHUNKED]), min_size=1, max_size=70))
def test_every_layer_is_in_one_group_of_its_own_kind(visibilities: list[Visibility]) -> None:
    layers = [layer(visibility) for visibility in visibilities]
    groups = group_layers(layers)
    assert sorted(index for group in groups for index in group.layers) == list(range(len(layers)))
    assert all(layers[index].visibility == group.visibility for group in groups for index in group.layers)


def test_lanes_are_as_wide_as_their_widest_layer() -> None:
    layers = [layer(SLIDING, kv_heads=2), layer(FULL, kv_heads=1, dim=16)]
    groups = group_layers(layers)
    assert lane_elements(layers, groups) == [(16, 16)]
    assert bytes_per_block(layers, groups, block_size=4, element_bytes=2) == 32 * 4 * 2


def test_a_window_bounds_what_a_long_sequence_holds() -> None:
    full, sliding = [CacheGroup(FULL, (0,))], [CacheGroup(SLIDING, (0,))]
    assert blocks_for_sequence(full, num_tokens=1000, chunk=4, block_size=4) == 250
    assert blocks_for_sequence(sliding, num_tokens=1000, chunk=4, block_size=4) <= 6

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwright.cache.spec import CacheGroup, LayerSpec, Visibility, VisibilityKind, group_layers
from shardwright.worker.report import local_groups, merged_groups

FULL, WINDOW = Visibility(), Visibility(VisibilityKind.SLIDING, 16)


def groups_of(kinds: str) -> list[CacheGroup]:
    """Groups of layers `f` (full) and `s` (sliding), in order."""
    return group_layers(
        [LayerSpec(f"{i}", 2, 2, 8, 8, FULL if kind == "f" else WINDOW) for i, kind in enumerate(kinds)]
    )


def test_one_stage_keeps_its_groups() -> None:
    groups = groups_of("sssfsssf")
    assert merged_groups([groups], [8]) == groups
    assert local_groups(groups, groups) == list(range(len(groups)))


def test_stages_share_groups_of_one_visibility() -> None:
    first, last = groups_of("ss"), groups_of("fsf")
    merged = merged_groups([first, last], [2, 3])
    assert [(g.visibility, g.layers) for g in merged[:1]] == [(WINDOW, (0, 1, 3))]
    assert [g.visibility for g in merged].count(FULL) == len([g for g in last if g.visibility == FULL])
    assert local_groups(merged, first) == [0, *[None] * (len(merged) - 1)]


@given(st.lists(st.text("fs", min_size=1, max_size=9), min_size=1, max_size=4))
def test_every_layer_is_in_one_group_and_every_group_of_a_stage_has_its_place(stages: list[str]) -> None:
    parts = [groups_of(kinds) for kinds in stages]
    merged = merged_groups(parts, [len(kinds) for kinds in stages])
    assert sorted(layer for group in merged for layer in group.layers) == list(range(len("".join(stages))))
    first = 0
    for kinds, own in zip(stages, parts, strict=True):
        places = local_groups(merged, own)
        assert sorted(place for place in places if place is not None) == list(range(len(own)))
        for group, place in zip(merged, places, strict=True):
            held = [layer - first for layer in group.layers if first <= layer < first + len(kinds)]
            assert held == ([] if place is None else list(own[place].layers))
            assert place is None or own[place].visibility == group.visibility
        first += len(kinds)

"""Dealing units: everybody's part is whole units, together they are everything, and shared things stay whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import PlanError
from shardwright.plans.groups import Member, UnitGroup, UnitKind, deal, deal_grouped, ranges_of, ranges_of_all


@given(units=st.integers(0, 200), ranks=st.integers(1, 40))
def test_dealt_units_are_all_and_differ_by_one(units: int, ranks: int) -> None:
    pieces = deal(units, ranks)
    assert [unit for start, stop in pieces for unit in range(start, stop)] == list(range(units))
    sizes = [stop - start for start, stop in pieces]
    assert len(sizes) == ranks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(coarse=st.integers(1, 16), size=st.integers(1, 12), ranks=st.integers(1, 64))
def test_shared_things_stay_whole_while_there_are_enough(coarse: int, size: int, ranks: int) -> None:
    units = coarse * size
    if ranks > units:
        with pytest.raises(PlanError, match=f"at most {units} ranks"):
            deal_grouped(units, coarse, ranks, "heads")
        return
    pieces = deal_grouped(units, coarse, ranks, "heads")
    assert [unit for start, stop in pieces for unit in range(start, stop)] == list(range(units))
    if ranks <= coarse:
        assert all(start % size == 0 and stop % size == 0 for start, stop in pieces)
    else:  # no rank has parts of two shared things
        assert all(start // size == (stop - 1) // size for start, stop in pieces if stop > start)


def heads(queries: int, keys: int, width: int) -> UnitGroup:
    """A group of a fused `[q | k | v]` projection, and one whose heads lie by key head: `[q q k v | q q k v | ...]`."""
    q, k = queries * width, keys * width
    share = queries // keys
    block = (share + 2) * width
    nested = []
    for key in range(keys):
        start, span = key * block, (key * share, (key + 1) * share)
        nested.append(Member("nested", 0, ((start, start + share * width),), share, span))
        nested.append(Member("nested", 0, ((start + share * width, start + block),), 1, span))
    members = (
        Member("fused", 0, ((0, q),), queries),
        Member("fused", 0, ((q, q + k), (q + k, q + 2 * k)), keys),
        Member("output", 1, ((0, q),), queries),
        *nested,
    )
    return UnitGroup(UnitKind.HEADS, queries, members, "traced")


@given(keys=st.integers(1, 5), share=st.integers(1, 5), width=st.integers(1, 4), ranks=st.integers(1, 12))
def test_ranks_hold_their_heads_and_the_keys_that_these_need(keys: int, share: int, width: int, ranks: int) -> None:
    queries = keys * share
    if ranks > queries:
        return
    group = heads(queries, keys, width)
    q = queries * width
    for piece in group.pieces(ranks):
        mine = set(range(*piece))
        needed = {unit // share for unit in mine}
        by_name = {
            name: {
                index
                for start, stop in ranges_of_all([m for m in group.members if m.name == name], queries, piece)
                for index in range(start, stop)
            }
            for name in ("fused", "output", "nested")
        }
        assert by_name["output"] == {unit * width + i for unit in mine for i in range(width)}
        shared = {q + (part * keys + key) * width + i for part in (0, 1) for key in needed for i in range(width)}
        assert by_name["fused"] == by_name["output"] | shared
        block = (share + 2) * width
        own = {(u // share) * block + (u % share) * width + i for u in mine for i in range(width)}
        assert by_name["nested"] == own | {key * block + share * width + i for key in needed for i in range(2 * width)}


def test_nine_heads_of_three_keys() -> None:
    group = heads(9, 3, 64)
    assert group.pieces(2) == [(0, 6), (6, 9)]
    assert [stop - start for start, stop in group.pieces(4)] == [2, 1, 3, 3]
    keys = group.members[1]
    assert ranges_of(keys, 9, (0, 2)) == ranges_of(keys, 9, (2, 3)) == ((576, 640), (768, 832))


def test_a_part_without_units_of_a_span_is_empty() -> None:
    member = Member("w", 0, ((10, 14),), 2, span=(2, 4))
    assert ranges_of(member, 6, (0, 2)) == ()
    assert ranges_of(member, 6, (1, 3)) == ((10, 12),)
    assert ranges_of(member, 6, (0, 6)) == ((10, 14),)

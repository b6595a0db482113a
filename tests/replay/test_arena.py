"""Places in the arena."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwright.replay.arena import ALIGNMENT, plan_arena


@given(
    sizes=st.dictionaries(st.integers(0, 9), st.integers(0, 1000), min_size=1),
    uses=st.lists(st.frozensets(st.integers(0, 9), max_size=4), max_size=20),
)
def test_what_lives_at_the_same_time_lies_apart(sizes: dict[int, int], uses: list[frozenset[int]]) -> None:
    offsets, total = plan_arena(sizes, uses)
    used = frozenset().union(*uses) & sizes.keys()
    assert offsets.keys() == used
    assert all(offset % ALIGNMENT == 0 and offset + sizes[s] <= total for s, offset in offsets.items())
    lives = {s: [time for time, use in enumerate(uses) if s in use] for s in used}
    for one in used:
        for other in used - {one}:
            live_together = lives[one][0] <= lives[other][-1] and lives[other][0] <= lives[one][-1]
            apart = offsets[one] + sizes[one] <= offsets[other] or offsets[other] + sizes[other] <= offsets[one]
            assert apart or not live_together


def test_places_are_used_again() -> None:
    sizes = dict.fromkeys(range(50), 100)
    _, total = plan_arena(sizes, [frozenset({i, i + 1}) for i in range(49)])
    assert total <= 2 * 128

"""Which texts are read together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwright.pooling.batching import MOST_PADDING, Batching, choose_batch

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.sampled_from(Batching), st.integers(1, 16), st.integers(1, 1000))
def test_every_batch_keeps_its_limits(lengths: list[int], batching: Batching, max_texts: int, max_tokens: int) -> None:
    batch = choose_batch(lengths, batching, max_texts=max_texts, max_tokens=max_tokens)
    chosen = [lengths[place] for place in batch]
    padded = max(chosen) * len(chosen)
    assert batch[0] == 0
    assert len(set(batch)) == len(batch) <= max_texts
    assert len(batch) == 1 or padded <= max_tokens
    assert sum(chosen) >= padded * (1 - MOST_PADDING)
    if batching is Batching.EQUAL:
        assert len(set(chosen)) == 1
    if batching is Batching.ALONE:
        assert len(batch) == 1


@given(LENGTHS)
def test_every_text_gets_its_turn(lengths: list[int]) -> None:
    waiting = list(range(len(lengths)))
    for _ in lengths:
        if not waiting:
            break
        places = choose_batch([lengths[i] for i in waiting], Batching.PADDED, max_texts=4, max_tokens=500)
        waiting = [i for place, i in enumerate(waiting) if place not in places]
    assert not waiting


def test_those_nearest_in_length_come_along() -> None:
    assert sorted(choose_batch([10, 300, 11, 9, 100], Batching.PADDED, max_texts=8, max_tokens=2048)) == [0, 2, 3]
    assert choose_batch([10, 11, 10], Batching.EQUAL, max_texts=8, max_tokens=2048) == [0, 2]


def test_a_text_over_the_budget_is_read_alone() -> None:
    assert choose_batch([500, 500], Batching.PADDED, max_texts=8, max_tokens=100) == [0]

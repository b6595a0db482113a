from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwright.engine.prompt_lookup import PromptLookup


def propose(tokens: list[int], most: int, *, longest: int = 4, shortest: int = 2) -> list[int]:
    return PromptLookup(longest=longest, shortest=shortest).propose(tokens, most)


def by_hand(tokens: list[int], most: int, *, longest: int, shortest: int) -> list[int]:
    """What the docstring says, length by length and place by place."""
    for length in range(longest, shortest - 1, -1):
        ends = [
            end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[len(tokens) - length :]
        ]
        whole = [end for end in ends if end + most <= len(tokens)]
        if ends:
            start = whole[-1] if whole else ends[0]
            return tokens[start : start + most]
    return []


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 1, 2], 3) == [3, 4, 5]


def test_the_longest_run_decides_and_of_several_places_the_latest() -> None:
    tokens = [1, 2, 3, 50, 51, 8, 2, 3, 60, 61, 8, 9, 2, 3, 70, 71, 7, 1, 2, 3]
    assert propose(tokens, 2) == [50, 51]
    assert propose(tokens, 2, longest=2) == [70, 71]


def test_a_place_that_enough_follows_is_preferred() -> None:
    assert propose([7, 7, 7, 7, 7, 7], 4, longest=2, shortest=1) == [7, 7, 7, 7]
    assert propose([5, 6, 7, 6, 7], 4) == [6, 7]


def test_fewer_tokens_than_asked_for_are_no_match() -> None:
    assert propose([1, 9, 9, 1], 4) == []
    assert propose([1, 9, 9, 1], 4, shortest=1) == [9, 9, 1]
    assert propose([1], 4) == []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    grown_from=st.integers(1, 40),
    most=st.integers(1, 6),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_it_finds_what_a_search_by_hand_finds(
    tokens: list[int], grown_from: int, most: int, lengths: tuple[int, int]
) -> None:
    shortest, longest = sorted(lengths)
    lookup = PromptLookup(longest=longest, shortest=shortest)
    lookup.propose(tokens[:grown_from], most)
    assert lookup.propose(tokens, most) == by_hand(tokens, most, longest=longest, shortest=shortest)


def test_a_sequence_longer_than_the_first_table_is_looked_through_whole() -> None:
    lookup = PromptLookup(longest=3, shortest=3)
    tokens = list(range(1000))
    assert lookup.propose(tokens[:10], 2) == []
    assert lookup.propose([*tokens, 5, 6, 7], 2) == [8, 9]
    assert lookup.propose([*tokens, 5, 6, 7, 900, 901, 902], 2) == [903, 904]

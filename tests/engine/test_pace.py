from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwright.engine.pace import LONGEST_REST, Pace


def test_wrong_guesses_are_halved_and_right_ones_doubled() -> None:
    pace = Pace(4)
    lengths = [pace.length]
    for accepted in (0, 0, 1, 2, 4, 2):
        pace.take(pace.length, accepted)
        lengths.append(pace.length)
    assert lengths == [4, 2, 1, 2, 4, 4, 4]


def steps_until_next_guess(pace: Pace) -> int:
    count = 0
    while pace.length == 0:
        assert pace.length_after(guesses_now=False) == (1 if pace._num_resting <= 1 else 0)
        pace.take(0, 0)
        count += 1
    return count


def test_pauses_grow_until_a_guess_is_right() -> None:
    pace, pauses = Pace(1), []
    for _ in range(7):
        pace.take(1, 0)
        pauses.append(steps_until_next_guess(pace))
    assert pauses == [1, 2, 4, 8, 16, 32, 32]
    pace.take(1, 1)
    pace.take(1, 0)
    assert steps_until_next_guess(pace) == 1


def test_a_step_without_proposals_says_nothing_about_them() -> None:
    pace = Pace(4)
    for _ in range(5):
        pace.take(0, 0)
    assert pace.length == 4


@given(most=st.integers(1, 8), rates=st.lists(st.floats(0, 1), max_size=60))
def test_what_may_be_drafted_is_never_less_than_what_is_verified(most: int, rates: list[float]) -> None:
    pace, resting = Pace(most), 0
    for rate in rates:
        assert pace.length <= most
        proposed = pace.length
        promised = pace.length_after(guesses_now=proposed > 0)
        pace.take(proposed, int(rate * proposed))
        assert pace.length <= promised
        resting = 0 if pace.length else resting + 1
        assert resting <= LONGEST_REST

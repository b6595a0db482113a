import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.engine.stop_strings import StopStrings


def feed(stops: StopStrings, pieces: list[str]) -> tuple[list[str], str | None]:
    """Texts given out for the pieces, with what is flushed at the end; and the stop string found."""
    given_out = []
    for piece in pieces:
        text, stop = stops.push(piece)
        given_out.append(text)
        if stop is not None:
            return given_out, stop
    return [*given_out, stops.flush()], None


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """End and string of the first stop string to be complete, character by character; of several, the longest."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(ending, key=len)
    return None


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3)


@given(st.lists(st.text(alphabet="abc", max_size=4), max_size=12), STOPS, st.booleans())
def test_pieces_give_what_a_search_of_the_whole_text_gives(pieces, stops, include):
    given_out, stop = feed(StopStrings(stops, include=include), pieces)
    whole = "".join(pieces)
    match = first_stop(whole, stops)
    if match is None:
        assert ("".join(given_out), stop) == (whole, None)
    else:
        end, wanted = match
        assert ("".join(given_out), stop) == (whole[: end if include else end - len(wanted)], wanted)


@given(st.lists(st.text(alphabet="abc", max_size=4), max_size=12), STOPS)
def test_no_more_is_held_back_than_a_stop_string_may_begin_with(pieces, stops):
    checker, so_far, given_out = StopStrings(stops), "", ""
    for piece in pieces:
        so_far += piece
        text, stop = checker.push(piece)
        given_out += text
        if stop is not None:
            return
        held = so_far[len(given_out) :]
        endings = [so_far[start:] for start in range(len(so_far) + 1)]
        assert held == next(end for end in endings if any(stop.startswith(end) for stop in stops))


@pytest.mark.parametrize("include", [True, False])
def test_text_before_a_stop_string_goes_out_at_once(include):
    stops = StopStrings(["</end>"], include=include)
    assert stops.push("hello <") == ("hello ", None)
    assert stops.push("/e") == ("", None)
    assert stops.push("at> ") == ("</eat> ", None)
    assert stops.push("bye</end>!") == ("bye</end>" if include else "bye", "</end>")


def test_a_stop_string_that_is_complete_too_early_passes():
    stops = StopStrings(["ab"])
    assert stops.push("xa", may_stop=False) == ("x", None)
    assert stops.push("b", may_stop=False) == ("ab", None)
    assert stops.push("a", may_stop=True) == ("", None)
    assert stops.push("b", may_stop=True) == ("", "ab")


def test_without_stop_strings_text_passes():
    assert feed(StopStrings([]), ["a", "b"]) == (["a", "b", ""], None)

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.engine.tokenizers_for_tests import (
    EOS,
    STRADDLING_ID,
    byte_ids,
    byte_tokenizer,
    metaspace_tokenizer,
    sentencepiece_tokenizer,
    token_bytes,
    wordpiece_tokenizer,
)

from shardwright.engine.detokenizer import Detokenizer
from shardwright.models.tokenizer import Tokenizer

BYTE_IDS = st.integers(0, byte_tokenizer().vocab_size - 1)
TEXT = st.text() | st.text(alphabet="ab \u00e9\u20ac\u65e5\U0001f600\u0301\u200d\ufe0f\ufffd\n")


def deltas(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, skip: bool = True, prompt: Sequence[int] = ()
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_token_ids=prompt)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def is_incomplete(data: bytes) -> bool:
    """Whether bytes are less than a character, and some bytes would complete it."""
    endings = [bytes([byte]) + b"\x80" * more for byte in (0x80, 0x8F, 0x90, 0xBF) for more in range(3)]
    for ending in endings:
        with contextlib.suppress(UnicodeDecodeError):
            if len((data + ending).decode()) == 1:
                return True
    return False


def whole_characters(data: bytes) -> str:
    """Text of bytes, short of an incomplete character at the end."""
    tails = (length for length in (3, 2, 1) if length <= len(data) and is_incomplete(data[-length:]))
    return data[: len(data) - next(tails, 0)].decode(errors="replace")


@settings(deadline=None, max_examples=300)
@given(st.lists(BYTE_IDS, max_size=80), st.booleans())
@example(byte_ids(b"\x80" * 70 + "\U0001f600 \u20ac".encode()), True)
@example(byte_ids(b"\xf0\x9f" * 50), True)
@example(byte_ids(b"\xe2") + [EOS] * 40 + byte_ids(b"\x82\xac!"), True)
@example(byte_ids(b"\xe2\x82") + byte_tokenizer().encode("\u20ac")[:1] * 3, True)
@example([STRADDLING_ID] * 60, True)  # every token ends within a character
def test_any_byte_tokens_give_the_whole_text_but_for_an_incomplete_character(token_ids, skip):
    tokenizer = byte_tokenizer()
    text = "".join(deltas(tokenizer, token_ids, skip=skip))
    data = b"".join(token_bytes(token_id, skip_special_tokens=skip) for token_id in token_ids)
    assert text == whole_characters(data)
    assert tokenizer.decode(token_ids, skip_special_tokens=skip) in (text, text + "\ufffd")


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_valid_text_comes_in_whole_characters(text):
    parts = deltas(byte_tokenizer(), byte_ids(text.encode()))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert parts == [*(part for char in text for part in [""] * (len(char.encode()) - 1) + [char]), ""]


@settings(deadline=None, max_examples=200)
@given(TEXT, TEXT.map(lambda text: text.replace("\ufffd", "")))
def test_sentencepiece_keeps_spaces_and_bytes_whole(prompt, text):
    tokenizer = sentencepiece_tokenizer()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(deltas(tokenizer, token_ids)) == tokenizer.decode(token_ids)
    # After a prompt the space before the first word is text.
    prompt_ids = tokenizer.encode(prompt + ".", add_special_tokens=False)
    continued = "".join(deltas(tokenizer, token_ids, prompt=prompt_ids))
    assert tokenizer.decode(prompt_ids) + continued == tokenizer.decode(prompt_ids + token_ids)


@pytest.mark.parametrize("make_tokenizer", [metaspace_tokenizer, wordpiece_tokenizer, sentencepiece_tokenizer])
@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2**16), max_size=60), st.booleans())
def test_any_word_tokens_give_the_whole_text(make_tokenizer, numbers, skip):
    tokenizer = make_tokenizer()
    first = 260 if tokenizer is sentencepiece_tokenizer() else 4  # without bytes, which must form characters
    token_ids = [(*range(4), *range(first, tokenizer.vocab_size))[n % (tokenizer.vocab_size - first)] for n in numbers]
    assert "".join(deltas(tokenizer, token_ids, skip=skip)) == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_half_a_character_is_held_back_and_dropped_at_the_end():
    assert deltas(byte_tokenizer(), byte_ids(b"a\xe2\x82")) == ["a", "", "", ""]
    assert deltas(byte_tokenizer(), byte_ids("\U0001f600!".encode())) == ["", "", "", "\U0001f600", "!", ""]


def test_every_incomplete_character_is_dropped_and_every_wrong_byte_kept():
    two = [bytes([first, second]) for first in range(0xC0, 0x100) for second in range(0x7F, 0xC1)]
    three = [pair + b"\x8f" for pair in two if pair[0] >= 0xE0]
    for data in [*(bytes([byte]) for byte in range(256)), *two, *three]:
        assert "".join(deltas(byte_tokenizer(), byte_ids(b"a" + data))) == whole_characters(b"a" + data)


def test_sentencepiece_drops_an_incomplete_character_and_keeps_wrong_bytes():
    tokenizer = sentencepiece_tokenizer()
    assert deltas(tokenizer, byte_ids(b"\xe2\x82")) == ["", "", ""]
    assert deltas(tokenizer, byte_ids(b"\xe2\xff")) == ["", "", "\ufffd\ufffd"]
    assert deltas(tokenizer, byte_ids("\u20ac".encode() + b"\xe2\x82")) == ["", "", "\u20ac", "", "", ""]


def test_a_genuine_replacement_character_passes_with_what_follows():
    assert deltas(byte_tokenizer(), byte_ids("a\ufffdb".encode())) == ["a", "", "", "", "\ufffdb", ""]
    assert deltas(byte_tokenizer(), byte_ids("a\ufffd".encode())) == ["a", "", "", "", "\ufffd"]


def test_wrong_bytes_do_not_hold_the_text_back_for_ever():
    parts = deltas(byte_tokenizer(), byte_ids(b"\xff" * 100))
    assert len("".join(parts[:-1])) >= 97
    assert len("".join(parts)) == 100


def test_a_prompt_that_ends_within_a_character_does_not_change_the_text():
    tokenizer = byte_tokenizer()
    assert deltas(tokenizer, byte_ids(b"\x82\xacb"), prompt=byte_ids(b"a\xe2")) == ["", "", "\ufffd\ufffdb", ""]
    assert tokenizer.decode(byte_ids(b"\x82\xacb")) == "\ufffd\ufffdb"


def test_tokens_without_a_text_leave_spaces_in_place():
    tokenizer = sentencepiece_tokenizer()
    (word,) = tokenizer.encode("to", add_special_tokens=False)
    assert "".join(deltas(tokenizer, [word, *[EOS] * 50, word])) == "to to"
    assert "".join(deltas(tokenizer, [word, *[tokenizer.vocab_size + 9] * 50, word])) == "to to"


class CountingTokenizer(Tokenizer):
    """Records how many tokens each call decodes."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer()._hf)
        self.lengths: list[int] = []

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.lengths.append(len(token_ids))
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    "token_ids",
    [
        byte_ids(b"abcd" * 250),
        byte_ids("\u20ac\U0001f600".encode() * 150),
        byte_ids(b"\xff" * 1000),
        byte_ids(b"\xe2") + [EOS] * 1000,
        [EOS] * 1000,
        [STRADDLING_ID] * 1000,
        [10**6] * 1000,
    ],
    ids=["ascii", "multibyte", "wrong", "special after half", "special", "straddling", "unknown"],
)
def test_the_cost_of_a_token_does_not_grow_with_the_text(token_ids):
    tokenizer = CountingTokenizer()
    deltas(tokenizer, token_ids)
    assert max(tokenizer.lengths) <= 32
    assert sum(tokenizer.lengths) / len(token_ids) <= 33

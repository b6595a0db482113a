"""Tokens to text while they come, without ever showing half a character.

A token's text depends on its neighbours: bytes of one character may lie in several tokens, and sentencepiece drops the
space before the first word. So a short window of recent tokens is decoded again with each new one, and what it says
beyond the text already given out is new. The window restarts where it ends in a whole character, which keeps the cost
of a token the same however long the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.models.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_PRIVATE_CHARACTER = "\U0010fffd"
_MAX_CHARACTER_TOKENS = 4
"""UTF-8 characters have at most four bytes, so four tokens or more that end in none hold a wrong byte."""
_MAX_INCOMPLETE = 3
"""Replacement characters that an incomplete character may show as: one for each of its bytes, or one for all."""
_CONTEXT = 8
"""Tokens of the prompt that the first window begins with, and length of a window that restarts on wrong bytes."""
_MAX_WINDOW = 16
"""Length from which a window restarts at the next whole character; twice as long, it restarts anywhere."""


class Detokenizer:
    """Incremental text of one sequence.

    What `push` returns, joined, and then `finish`, is the text of all tokens decoded at once, short of an incomplete
    character at the end. (Sentencepiece's byte tokens decode to nothing but replacement characters where a single byte
    among them is wrong. Text already given out stays.)

    Args:
        tokenizer: decodes windows of tokens.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: what comes before the first token, so that a space between the two is kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int]
        self._text: str
        """Of the window."""
        self._num_shown: int
        """Characters of `_text` that have been given out."""
        self._num_whole: int
        """Tokens of the window up to where it last ended in a whole character."""
        self._restart(list(prompt_token_ids[-_CONTEXT:]))
        if self._text.endswith(_REPLACEMENT):  # a prompt that ends inside a character is no context
            self._restart([])

    def push(self, token_id: int) -> str:
        """Text that a token completes; empty while it is part of a character."""
        text = self._decode([*self._window, token_id])
        if text == self._text and self._is_textless(token_id):
            return ""
        self._window.append(token_id)
        self._text = text
        end = len(text.rstrip(_REPLACEMENT))
        is_whole = end == len(text)
        if not is_whole and len(self._window) - self._num_whole >= _MAX_CHARACTER_TOKENS:
            end = max(end, len(text) - _MAX_INCOMPLETE)
        delta = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        if is_whole:
            whole_before, self._num_whole = self._num_whole, len(self._window)
            if len(self._window) >= _MAX_WINDOW and delta:
                self._restart(self._window[whole_before:])
        elif len(self._window) >= 2 * _MAX_WINDOW:
            delta += self._restart_on_wrong_bytes()
        return delta

    def finish(self) -> str:
        """The rest of the text: wrong bytes at the end, but not those that would be a character with more to come."""
        pending = self._text[self._num_shown :]
        if not pending:
            return ""
        for continuation in _continuations(self._tokenizer):
            completed = self._decode([*self._window, *continuation])
            if not completed.endswith(_REPLACEMENT):
                both = zip(pending, completed[self._num_shown :], strict=False)
                return "".join(old for old, _ in takewhile(lambda pair: pair[0] == pair[1], both))
        return pending

    def _restart(self, window: list[int]) -> None:
        """Begin a new window, all of whose text has been given out."""
        self._window = window
        self._text = self._decode(window) if window else ""
        self._num_shown = len(self._text)
        self._num_whole = len(window)

    def _restart_on_wrong_bytes(self) -> str:
        """Begin a window inside what decodes to no whole character; returns text to give out with it."""
        pending = self._text[self._num_shown :]
        self._restart(self._window[-_CONTEXT:])
        if not self._text.endswith(pending):
            return pending
        self._num_shown -= len(pending)
        self._num_whole = 0
        return ""

    def _is_textless(self, token_id: int) -> bool:
        """Whether a token that changed nothing never will. Sentencepiece's space shows once it does not come first."""
        return not self._decode([token_id, token_id])

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _continuations(tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of bytes of which one or another completes any incomplete character; none if the tokenizer has no bytes.

    They are taken from a character that no tokenizer has merged, since it is in no text: its bytes are F4 8F BF BD.
    """
    token_ids = tokenizer.encode(_PRIVATE_CHARACTER, add_special_tokens=False)[-4:]
    if len(token_ids) < 4 or tokenizer.decode(token_ids) != _PRIVATE_CHARACTER:
        return []
    _, low, high, _ = token_ids
    # Most leading bytes take BF as their second byte; ED and F4, which take no large ones, take 8F.
    return [[high], [high, high], [high, high, high], [low, high], [low, high, high]]

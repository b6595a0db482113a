"""Guessing what follows from the sequence itself: what stood there when the same tokens came before. No torch here.

Source: Saxena, "Prompt lookup decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 256


class PromptLookup:
    """The tokens of one sequence, to be looked through.

    Args:
        longest, shortest: most and fewest of its last tokens that have to have come before.
    """

    def __init__(self, *, longest: int, shortest: int) -> None:
        self._longest = longest
        self._shortest = shortest
        self._tokens: npt.NDArray[np.int32] = np.empty(_FIRST_CAPACITY, np.int32)
        self._num_tokens = 0

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        """What followed the longest run of last tokens that is there earlier too; of several, the latest place that as
        many tokens follow as are wanted, or else the earliest.

        Args:
            token_ids: the sequence: the one that it was at the last call, or longer.
            most: tokens wanted, at least one.

        Returns: up to `most` tokens; none if fewer than `shortest` of the last tokens came before.
        """
        tokens = self._taken_in(token_ids)
        end = len(tokens)
        after = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1
        length = 1 if len(after) else 0
        while length and length < self._longest:
            longer = after[after > length]
            longer = longer[tokens[longer - length - 1] == tokens[end - length - 1]]
            if not len(longer):
                break
            after, length = longer, length + 1
        if length < self._shortest:
            return []
        place = int(np.searchsorted(after, end - most, side="right")) - 1
        start = int(after[max(place, 0)])
        proposed: list[int] = tokens[start : start + most].tolist()
        return proposed

    def _taken_in(self, token_ids: list[int]) -> npt.NDArray[np.int32]:
        """The sequence as an array; only what is new is copied."""
        if len(token_ids) > len(self._tokens):
            grown = np.empty(2 * len(token_ids), np.int32)
            grown[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = grown
        self._tokens[self._num_tokens : len(token_ids)] = token_ids[self._num_tokens :]
        self._num_tokens = len(token_ids)
        return self._tokens[: self._num_tokens]

"""How far ahead it is worth guessing for one sequence. No torch here.

Twice as far after a step in which every guess was right, half as far after one in which none was. Where a single guess
was wrong too, the next steps guess nothing: one step, then 2, 4 and so on up to 32, until a guess is right again.
"""

from __future__ import annotations

LONGEST_REST = 32
"""Steps without a guess, at most."""


class Pace:
    """The pace of one sequence.

    Args:
        most: tokens guessed ahead at most, and at first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = most
        self._rest = 1
        """Steps of the next pause."""
        self._num_resting = 0
        """Steps that are left of this pause."""

    @property
    def length(self) -> int:
        """Tokens to guess ahead in this step; 0 in a pause."""
        return 0 if self._num_resting else self._length

    def length_after(self, *, guesses_now: bool) -> int:
        """Most tokens to guess ahead in the step after this one.

        Args:
            guesses_now: whether this step guesses.
        """
        if self._num_resting > 1:
            return 0
        return min(2 * self._length, self._most) if guesses_now else self._length

    def stop(self) -> None:
        """Never guess again."""
        self._most = self._length = 0

    def take(self, num_proposed: int, num_accepted: int) -> None:
        """A step has guessed so many tokens, of which so many were right."""
        if not num_proposed:
            self._num_resting = max(0, self._num_resting - 1)
        elif num_accepted:
            self._rest = 1
            if num_accepted == num_proposed:
                self._length = min(2 * self._length, self._most)
        elif self._length > 1:
            self._length //= 2
        else:
            self._num_resting = self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)

"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in new text only, and holds back what may become one.

    The first string to be complete wins; of several that end with the same character, the longest.

    Args:
        stops: non-empty strings.
        include: a stop string that was found is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        """End of the text so far, not given out yet: the longest that a stop string begins with."""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take new text.

        Args:
            text: what follows the text before.
            may_stop: False lets stop strings that are complete by now pass.

        Returns: text to give out, and the stop string that ended it, after which no more text may come.
        """
        if not self._stops:
            return text, None
        num_old = len(self._held)
        text = self._held + text
        if may_stop and (found := self._find(text, num_old)) is not None:
            end, stop = found
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """The text that was held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, num_old: int) -> tuple[int, str] | None:
        """End and string of the first match that ends beyond the first `num_old` characters."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), -len(stop), stop))
        if not matches:
            return None
        end, _, stop = min(matches)
        return end, stop


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` as a whole left out."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

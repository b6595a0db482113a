"""Which texts are read together. No torch: the engine decides by it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

MOST_PADDING = 0.25
"""Share of a batch that may be padding."""


class Batching(StrEnum):
    """Which texts may share a forward pass. From best to worst."""

    PADDED = "padded to the longest"
    EQUAL = "of equal length"
    ALONE = "one by one"

    def allows(self, length: int, other: int) -> bool:
        """Whether two texts of these lengths may share a forward pass."""
        return self is Batching.PADDED or (self is Batching.EQUAL and length == other)


def choose_batch(lengths: Sequence[int], batching: Batching, *, max_texts: int, max_tokens: int) -> list[int]:
    """Places of the texts to read next: the oldest, so that none waits for ever, and those nearest to it in length.

    Args:
        lengths: of the texts that wait, in tokens, oldest first; at least one.
        batching: what the model takes together.
        max_texts: most texts in a batch.
        max_tokens: most tokens in a batch, padding included; a text alone may be longer.
    """
    batch = [0]
    others = [place for place in range(1, len(lengths)) if batching.allows(lengths[0], lengths[place])]
    longest = num_tokens = lengths[0]
    for place in sorted(others, key=lambda place: abs(lengths[place] - lengths[0])):
        longest = max(longest, lengths[place])
        num_tokens += lengths[place]
        padded = longest * (len(batch) + 1)
        if len(batch) == max_texts or padded > max_tokens or num_tokens < padded * (1 - MOST_PADDING):
            break
        batch.append(place)
    return batch

"""Which replica gets a prompt: the one that has least to do, where what is cached of the prompt need not be done.

What replicas have cached is guessed from what they were given: by the keys that their own caches use, each replica as
many as its cache has blocks, least recently used first out.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence

MAX_KEYS = 1 << 17
"""Most keys remembered per replica, about 10 MiB."""


class Router:
    """Remembers which prefixes replicas have seen.

    Args:
        num_replicas: how many there are.
        block_size: tokens that a key stands for.
        num_blocks: of each replica's cache; 0: nothing is found again.
    """

    def __init__(self, num_replicas: int, *, block_size: int, num_blocks: int) -> None:
        self._block_size = block_size
        self._max_keys = min(num_blocks, MAX_KEYS)
        self._known: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_replicas)]
        self._choices = itertools.count(1)
        self._last_chosen = [0] * num_replicas

    def choose(self, keys: Sequence[bytes], loads: Mapping[int, int]) -> int:
        """The replica for a prompt.

        Args:
            keys: of its whole blocks.
            loads: per replica that may be chosen, the tokens of its unfinished sequences. A token to be computed weighs
                as much as one of a sequence beside it; equals take turns.
        """

        def cost(replica: int) -> tuple[int, int]:
            return loads[replica] - self.num_cached(replica, keys), self._last_chosen[replica]

        chosen = min(loads, key=cost)
        self._last_chosen[chosen] = next(self._choices)
        return chosen

    def num_cached(self, replica: int, keys: Sequence[bytes]) -> int:
        """Tokens at the beginning of a prompt that a replica probably has cached."""
        known = self._known[replica]
        found = next((place for place, key in enumerate(keys) if key not in known), len(keys))
        return found * self._block_size

    def note(self, replica: int, keys: Sequence[bytes]) -> None:
        """A replica computes the blocks of these keys."""
        known = self._known[replica]
        for key in reversed(keys):  # the end of a prefix goes before its beginning, without which it is not found
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._max_keys:
            known.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica's cache is empty."""
        self._known[replica].clear()

"""The pool of KV blocks: reference counts, an index of cached prefixes, least recently used first out.

A block is in one of three states:
    held     by one or more sequences (reference count over 0)
    cached   by nobody, but its content can still be found by its key
    empty    by nobody, content forgotten
Cached and empty blocks together are *free*: both can be allocated, the least recently freed first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from shardwright.cache.spec import NULL_BLOCK


class BlockPool:
    """Owner of all block ids from 1 to `num_blocks`; NULL_BLOCK is nobody's.

    Args:
        num_blocks: blocks to hand out.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._key_of: dict[int, Hashable] = {}
        self._block_of: dict[Hashable, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, forgetting what was cached in them. Raises ValueError if there are fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold cached or held blocks once more."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks. Those that nobody holds any more become free, the last of the list to be reused first."""
        for block in reversed(blocks):
            if block == NULL_BLOCK:
                continue
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def store(self, block: int, key: Hashable) -> None:
        """Make a held block findable by the key of its content, unless another block already is."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: Hashable) -> int | None:
        """The block with this content, held or cached."""
        return self._block_of.get(key)

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free now, so that acquiring them uses up free blocks."""
        return sum(1 for block in set(blocks) if block != NULL_BLOCK and self._references[block] == 0)

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop these blocks' content from the index."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """Drop the index of cached content; blocks stay with their holders."""
        self._block_of.clear()
        self._key_of.clear()

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless reference counts are exactly those of the block tables given, and nothing
        leaks.
        """
        counts = [0] * (self.num_blocks + 1)
        for table in holders:
            for block in table:
                if block != NULL_BLOCK:
                    counts[block] += 1
        assert counts == self._references, "reference counts differ from what block tables hold"
        free = {block for block in range(1, self.num_blocks + 1) if counts[block] == 0}
        assert free == set(self._free), "free blocks and unreferenced blocks differ"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, (
            "the two sides of the index differ"
        )

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

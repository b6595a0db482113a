"""Block tables of the running sequences: allocation, prefix hits, and what falls out of windows."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardwright.cache.block_pool import BlockPool
from shardwright.cache.spec import NULL_BLOCK, CacheGroup


@dataclass(slots=True)
class BlockTables:
    """Blocks of one sequence: a table per cache group. Written by BlockManager only."""

    tables: list[list[int]]
    num_stored: list[int]
    """Per group, leading blocks already offered to the prefix index."""
    num_dropped: list[int]
    """Per group, leading blocks that fell out of the window."""
    num_told: list[int]
    """Per group, leading blocks that the worker has been told of."""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Cached blocks that cover the first `num_tokens` of a prompt; not held yet."""

    num_tokens: int = 0
    tables: list[list[int]] = field(default_factory=list)


class BlockManager:
    """Gives sequences the blocks they need for the tokens of a step.

    Args:
        pool: shared by all groups.
        groups: cache groups of the model.
        block_size: tokens per block.
        enable_prefix_caching: whether full blocks can be found again.
    """

    def __init__(
        self, pool: BlockPool, groups: list[CacheGroup], *, block_size: int, enable_prefix_caching: bool
    ) -> None:
        self.pool = pool
        self.groups = groups
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def find_prefix(self, keys: list[bytes], max_tokens: int) -> PrefixHit:
        """The longest cached prefix of at most `max_tokens` tokens, in whole blocks.

        A group with a window needs only the blocks that the first token after the prefix still sees.
        """
        if not self.enable_prefix_caching or not self.groups:
            return PrefixHit()
        length = min(len(keys), max_tokens // self.block_size)
        while length > 0:
            tables = []
            for index, group in enumerate(self.groups):
                first = self._first_block(group, length * self.block_size)
                found = [self.pool.find((index, key)) for key in keys[first:length]]
                missing = next((i for i in range(len(found) - 1, -1, -1) if found[i] is None), None)
                if missing is not None:
                    # With a window, a shorter prefix may do where a later block is missing; without, only the part
                    # before it.
                    length = first + missing if group.visibility.size is not None else first + found.index(None)
                    break
                tables.append([NULL_BLOCK] * first + [block for block in found if block is not None])
            else:
                return PrefixHit(length * self.block_size, tables)
        return PrefixHit()

    def start(self, hit: PrefixHit) -> BlockTables:
        """Tables of a sequence that begins with the hit's blocks, which it holds from now on."""
        tables = [list(table) for table in hit.tables] or [[] for _ in self.groups]
        for table in tables:
            self.pool.acquire(table)
        num_blocks = hit.num_tokens // self.block_size
        return BlockTables(
            tables=tables,
            num_stored=[num_blocks] * len(tables),
            num_dropped=[sum(1 for block in table if block == NULL_BLOCK) for table in tables],
            num_told=[0] * len(tables),
        )

    def num_new_blocks(self, held: list[list[int]], num_tokens: int) -> int:
        """Blocks to allocate so that tables as long as `held` cover `num_tokens`."""
        needed = -(-num_tokens // self.block_size)
        return sum(max(0, needed - len(table)) for table in held or [[]] * len(self.groups))

    def can_start(self, hit: PrefixHit, num_tokens: int) -> bool:
        """Whether a sequence with this hit can be given blocks for its first `num_tokens` tokens."""
        taken = sum(self.pool.num_unheld(table) for table in hit.tables)
        return self.num_new_blocks(hit.tables, num_tokens) + taken <= self.pool.num_free

    def grow(self, blocks: BlockTables, num_tokens: int) -> bool:
        """Extend the tables to cover `num_tokens` tokens. False, and nothing done, if the pool cannot."""
        if self.num_new_blocks(blocks.tables, num_tokens) > self.pool.num_free:
            return False
        needed = -(-num_tokens // self.block_size)
        for table in blocks.tables:
            if needed > len(table):
                table.extend(self.pool.allocate(needed - len(table)))
        return True

    def drop_unseen(self, blocks: BlockTables, num_computed: int) -> None:
        """Release blocks that no token from position `num_computed` on can see."""
        for index, group in enumerate(self.groups):
            first, table = self._first_block(group, num_computed), blocks.tables[index]
            dropped = blocks.num_dropped[index]
            if first > dropped:
                self.pool.release(table[dropped:first])
                table[dropped:first] = [NULL_BLOCK] * (first - dropped)
                blocks.num_dropped[index] = first

    def store(self, blocks: BlockTables, keys: list[bytes], num_tokens: int) -> None:
        """Make the whole blocks of the first `num_tokens` tokens findable; they are computed by the end of the step."""
        if not self.enable_prefix_caching:
            return
        whole = min(num_tokens // self.block_size, len(keys))
        for index, table in enumerate(blocks.tables):
            for place in range(blocks.num_stored[index], whole):
                if table[place] != NULL_BLOCK:
                    self.pool.store(table[place], (index, keys[place]))
            blocks.num_stored[index] = max(blocks.num_stored[index], whole)

    def release(self, blocks: BlockTables) -> None:
        """Let go of all blocks of a sequence."""
        for table in blocks.tables:
            self.pool.release(table)
            table.clear()

    def _first_block(self, group: CacheGroup, num_computed: int) -> int:
        """Index of the first block that the token at position `num_computed`, or a later one, sees."""
        return group.visibility.first_visible(num_computed) // self.block_size

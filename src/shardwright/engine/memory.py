"""What running sequences hold of the workers' memory: a row of their tables, and blocks of their caches. No torch here.

Rows and blocks change hands here in the order of batches, and workers carry out batches in that order, so what is given
back may be handed out with the next batch. Blocks of sequences in flight are not given back (`Scheduler` sees to that).
"""

from __future__ import annotations

from collections.abc import Iterable

from shardwright.cache.block_pool import BlockPool
from shardwright.cache.manager import BlockManager, PrefixHit
from shardwright.cache.spec import CacheGroup, blocks_for_sequence
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.request import Request
from shardwright.worker.batch import TableUpdate


class SequenceMemory:
    """Owner of all rows and blocks.

    Args:
        limits: of the engine.
        groups: cache groups of the model.
    """

    def __init__(self, limits: SchedulerLimits, groups: list[CacheGroup]) -> None:
        self.groups = groups
        self._limits = limits
        self.reset()

    def reset(self) -> None:
        """Start over with empty caches; nobody holds anything."""
        limits = self._limits
        self._blocks = BlockManager(
            BlockPool(limits.num_blocks),
            self.groups,
            block_size=limits.block_size,
            enable_prefix_caching=limits.enable_prefix_caching,
        )
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        """Given back since the last batch."""

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._blocks.pool.num_free

    def find_prefix(self, request: Request) -> PrefixHit:
        """The longest cached prefix of a sequence that is to start, which leaves at least one token to compute."""
        if request.params.prompt_logprobs is not None:  # needs the logits of every prompt position
            return PrefixHit()
        keys = request.block_keys(self._limits.block_size) if self._limits.enable_prefix_caching else []
        return self._blocks.find_prefix(keys, max_tokens=request.num_tokens - 1)

    def has_room(self, request: Request, hit: PrefixHit, num_tokens: int, *, num_running: int) -> bool:
        """Whether blocks suffice for the first chunk and, beside others, for all that is known of the request.

        Without the second condition a long prompt would start, run out, be preempted, and start again.
        """
        if not self._blocks.can_start(hit, hit.num_tokens + num_tokens):
            return False
        if not num_running:
            return True
        pool = self._blocks.pool
        whole = blocks_for_sequence(
            self.groups,
            num_tokens=request.num_tokens + 1,
            chunk=self._limits.max_num_batched_tokens,
            block_size=self._limits.block_size,
        )
        held = sum(len(table) - pool.num_unheld(table) for table in hit.tables)
        spare = num_running * len(self.groups)  # each running sequence may need a block in the next steps
        return whole - held + spare <= pool.num_free

    def start(self, request: Request, hit: PrefixHit) -> None:
        """Give a sequence a row and the blocks of its cached prefix."""
        request.row = self._free_rows.pop()
        request.blocks = self._blocks.start(hit)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give a sequence blocks for its first `num_tokens` tokens. False, and nothing done, if there are too few."""
        assert request.blocks is not None
        return self._blocks.grow(request.blocks, num_tokens)

    def news(self, request: Request) -> list[TableUpdate]:
        """Blocks of a sequence that workers have not been told of; from now on they have."""
        assert request.blocks is not None
        updates = []
        for group, table in enumerate(request.blocks.tables):
            told = request.blocks.num_told[group]
            if told < len(table):
                updates.append(TableUpdate(request.held_row, group, told, table[told:]))
                request.blocks.num_told[group] = len(table)
        return updates

    def tell_again(self, request: Request) -> None:
        """Let `news` tell of all blocks of a sequence."""
        assert request.blocks is not None
        request.blocks.num_told = [0] * len(request.blocks.num_told)

    def store_prefix(self, request: Request, end: int) -> None:
        """Make the whole blocks of the first `end` tokens findable."""
        if not self._limits.enable_prefix_caching:
            return
        assert request.blocks is not None
        if end // self._limits.block_size > min(request.blocks.num_stored):
            self._blocks.store(request.blocks, request.block_keys(self._limits.block_size), end)

    def forget_prefix(self, request: Request) -> None:
        """Make what a sequence holds unfindable: it is not what its tokens say."""
        assert request.blocks is not None
        for table in request.blocks.tables:
            self._blocks.pool.forget(table)

    def forget_prefixes(self) -> None:
        """Make nothing findable; running sequences keep what they hold."""
        self._blocks.pool.forget_all()

    def drop_unseen(self, request: Request, position: int) -> None:
        """Take back blocks that no token from `position` on sees."""
        assert request.blocks is not None
        self._blocks.drop_unseen(request.blocks, position)

    def give_back(self, request: Request) -> None:
        """Take back the row and all blocks of a sequence."""
        assert request.blocks is not None
        self._blocks.release(request.blocks)
        request.blocks = None
        self._free_rows.append(request.held_row)
        self._freed_rows.append(request.held_row)
        request.row = None

    def take_freed_rows(self) -> list[int]:
        """Rows that came back since the last call."""
        freed, self._freed_rows = self._freed_rows, []
        return freed

    def return_freed_rows(self, rows: list[int]) -> None:
        """Workers were not told of them after all."""
        self._freed_rows = rows + self._freed_rows

    def check_integrity(self, holders: Iterable[Request]) -> None:
        """Raise AssertionError unless exactly these sequences hold rows and blocks, and none is lost or held twice."""
        holding = list(holders)
        self._blocks.pool.check_integrity([table for r in holding if r.blocks for table in r.blocks.tables])
        rows = [request.held_row for request in holding]
        assert sorted(rows + self._free_rows) == list(range(self._limits.max_num_seqs)), "a row is lost or owned twice"

"""BlockPool: ownership, reuse order, the index of cached content."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shardwright.cache.block_pool import BlockPool
from shardwright.cache.spec import NULL_BLOCK


def test_allocate_gives_distinct_blocks_and_never_the_null_block() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(5)
    assert sorted(blocks) == [1, 2, 3, 4, 5]
    assert NULL_BLOCK not in blocks


def test_allocate_more_than_free_is_refused_and_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(ValueError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_shared_block_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.acquire([block])
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2


def test_cached_block_is_found_until_it_is_reused() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.store(block, "key")
    pool.release([block])
    assert pool.find("key") == block
    pool.allocate(2)
    assert pool.find("key") is None


def test_least_recently_freed_content_is_forgotten_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, "abc", strict=True):
        pool.store(block, key)
    pool.release([blocks[1]])
    pool.release([blocks[0]])
    pool.release([blocks[2]])
    pool.allocate(1)
    assert [pool.find(key) for key in "abc"] == [blocks[0], None, blocks[2]]


def test_the_end_of_a_released_sequence_is_reused_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, "abc", strict=True):
        pool.store(block, key)
    pool.release(blocks)
    pool.allocate(1)
    assert [pool.find(key) is not None for key in "abc"] == [True, True, False]


def test_empty_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(2)
    cached, empty = pool.allocate(2)
    pool.store(cached, "key")
    pool.release([cached])
    pool.release([empty])
    assert pool.allocate(1) == [empty]
    assert pool.find("key") == cached


def test_the_same_content_in_two_blocks_is_indexed_once() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.store(first, "key")
    pool.store(second, "key")
    pool.release([first, second])
    pool.check_integrity([])
    assert pool.find("key") == first


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share, go, in any order; after each move every block is accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.holders: list[list[int]] = []
        self.next_key = 0

    @rule(count=st.integers(1, 6))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            self.holders.append(self.pool.allocate(count))

    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        if self.holders:
            table = data.draw(st.sampled_from(self.holders))
            self.next_key += data.draw(st.integers(0, 1))
            self.pool.store(data.draw(st.sampled_from(table)), self.next_key)

    @rule(key=st.integers(0, 20))
    def acquire_found(self, key: int) -> None:
        block = self.pool.find(key)
        if block is not None:
            self.pool.acquire([NULL_BLOCK, block])
            self.holders.append([NULL_BLOCK, block])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.holders:
            self.pool.forget(data.draw(st.sampled_from(self.holders)))

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()

    @invariant()
    def every_block_is_held_or_free_and_nothing_leaks(self) -> None:
        self.pool.check_integrity(self.holders)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase

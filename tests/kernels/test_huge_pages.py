"""Memory that is asked for ahead is had once, whole or in part, and is zeros."""

from __future__ import annotations

import threading

import psutil

from shardwright.kernels.huge_pages import (
    PAGE_BYTES,
    Reserve,
    empty_in_huge_pages,
    release,
    reserve,
    reserved_bytes,
)

SIZE = 24 * PAGE_BYTES


def test_what_was_reserved_is_handed_out_once() -> None:
    reserve(SIZE)
    assert reserved_bytes() == SIZE
    first, second = empty_in_huge_pages(SIZE - 100), empty_in_huge_pages(SIZE)
    assert reserved_bytes() == 0
    for memory in (first, second):
        assert memory.data_ptr() % PAGE_BYTES == 0
        assert not memory.any()
        memory.fill_(1)
    assert bool((first == 1).all())
    assert bool((second == 1).all())


def test_what_is_being_made_ready_is_not_written_to_once_it_is_taken() -> None:
    for _ in range(5):
        reserve(SIZE)
        memory = empty_in_huge_pages(SIZE)
        memory.fill_(7)
        assert bool((memory == 7).all())


def test_the_rest_goes_back_to_the_system() -> None:
    process, held = psutil.Process(), Reserve(SIZE, SIZE)
    held._thread.join()
    before = process.memory_info().rss
    memory = held.take(PAGE_BYTES, PAGE_BYTES)
    assert before - process.memory_info().rss >= SIZE - 2 * PAGE_BYTES
    assert not memory.any()


def test_a_reserve_may_be_asked_for_more_than_is_made_ready() -> None:
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    reserve(PAGE_BYTES, room=SIZE)
    assert reserved_bytes() == PAGE_BYTES
    memory = empty_in_huge_pages(SIZE)
    assert process.memory_info().rss - before < SIZE // 2
    assert not memory.any()
    assert reserved_bytes() == 0


def test_what_is_not_written_soon_goes_back_too() -> None:
    process = psutil.Process()
    reserve(SIZE, room=2 * SIZE)
    next(t for t in threading.enumerate() if t.name == "memory").join()
    before = process.memory_info().rss
    memory = empty_in_huge_pages(2 * SIZE, written=PAGE_BYTES)
    assert before - process.memory_info().rss >= SIZE - 2 * PAGE_BYTES
    assert not memory.any()


def test_too_small_a_reserve_is_given_back() -> None:
    reserve(PAGE_BYTES)
    assert len(empty_in_huge_pages(2 * PAGE_BYTES)) == 2 * PAGE_BYTES
    assert reserved_bytes() == 0
    reserve(SIZE)
    release()
    assert reserved_bytes() == 0


def test_little_memory_leaves_a_reserve_alone() -> None:
    reserve(SIZE)
    assert not empty_in_huge_pages(PAGE_BYTES - 1).any()
    assert reserved_bytes() == SIZE
    release()


def test_what_is_used_little_at_first_takes_no_page_of_megabytes() -> None:
    process, memory = psutil.Process(), empty_in_huge_pages(3 * PAGE_BYTES, small=PAGE_BYTES)
    before = process.memory_info().rss
    memory[0] = 1
    assert process.memory_info().rss - before < PAGE_BYTES // 2
    assert memory.sum() == 1
    memory.fill_(1)
    assert memory.all()

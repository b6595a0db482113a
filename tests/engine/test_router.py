"""The router: where a prompt is cached counts, and so does what else there is to do; what it remembers is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cache.prefix import extend_keys
from shardwright.engine.router import Router

BLOCK = 4


def keys_of(token_ids: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, token_ids, BLOCK)
    return keys


def make_router(num_blocks: int = 100) -> Router:
    return Router(3, block_size=BLOCK, num_blocks=num_blocks)


def test_without_anything_cached_the_least_loaded_is_chosen() -> None:
    router = make_router()
    assert router.choose(keys_of(list(range(40))), {0: 30, 1: 10, 2: 20}) == 1


def test_the_longest_cached_prefix_is_chosen() -> None:
    router = make_router()
    prompt = list(range(40))
    router.note(1, keys_of(prompt[:16]))
    router.note(2, keys_of(prompt[:32]))
    assert [router.num_cached(replica, keys_of(prompt)) for replica in range(3)] == [0, 16, 32]
    assert router.choose(keys_of(prompt), {0: 0, 1: 0, 2: 0}) == 2


def test_a_cached_prefix_does_not_outweigh_a_longer_queue() -> None:
    router = make_router()
    prompt = list(range(40))
    router.note(2, keys_of(prompt))
    assert router.choose(keys_of(prompt), {0: 0, 1: 5, 2: 39}) == 2
    assert router.choose(keys_of(prompt), {0: 0, 1: 5, 2: 41}) == 0


@pytest.mark.parametrize("length", [3, 20])
def test_idle_replicas_take_turns_so_that_all_caches_fill(length: int) -> None:
    router = make_router()
    chosen = []
    for first in range(0, 600, 100):
        keys = keys_of(list(range(first, first + length)))
        chosen.append(router.choose(keys, {0: 0, 1: 0, 2: 0}))
        router.note(chosen[-1], keys)
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_replicas_that_may_not_be_chosen_are_not() -> None:
    router = make_router()
    prompt = list(range(40))
    router.note(0, keys_of(prompt))
    assert router.choose(keys_of(prompt), {1: 1000}) == 1


def test_a_lost_cache_is_forgotten() -> None:
    router = make_router()
    prompt = list(range(40))
    router.note(0, keys_of(prompt))
    router.forget(0)
    assert router.num_cached(0, keys_of(prompt)) == 0


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    router = make_router(num_blocks=10)
    router.note(0, keys_of(list(range(32))))
    router.note(0, keys_of(list(range(100, 116))))
    assert router.num_cached(0, keys_of(list(range(100, 116)))) == 16
    assert router.num_cached(0, keys_of(list(range(32)))) == 24


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 60)), max_size=40), st.integers(0, 20))
def test_no_more_is_remembered_than_a_cache_has_blocks(notes: list[tuple[int, int, int]], num_blocks: int) -> None:
    router = make_router(num_blocks)
    for replica, family, length in notes:
        keys = keys_of([1000 * family + i for i in range(length)])
        router.note(replica, keys)
        assert router.num_cached(replica, keys) == min(len(keys), num_blocks) * BLOCK
        known = [sum(router.num_cached(replica, [key]) for key in keys_of_all()) for replica in range(3)]
        assert max(known) <= num_blocks * BLOCK


def keys_of_all() -> set[bytes]:
    return {key for family in range(6) for key in keys_of([1000 * family + i for i in range(60)])}

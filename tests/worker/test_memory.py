"""How much of a memory budget becomes KV blocks, and for how long a sequence they last."""

from __future__ import annotations

import logging

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cache.spec import CacheGroup, Visibility, VisibilityKind, blocks_for_sequence
from shardwright.config import CacheConfig
from shardwright.errors import ConfigError
from shardwright.worker.memory import CPU_DEFAULT_BYTES, CachePlan, kv_cache_budget, plan_cache

CPU = torch.device("cpu")
FULL = CacheGroup(Visibility(), (0, 1))
WINDOW = CacheGroup(Visibility(VisibilityKind.SLIDING, 32), (2, 3))
BLOCK_SIZE = 16
BLOCK_BYTES = 1000
MIB = 1 << 20


def plan(budget: int, groups: list[CacheGroup] | None = None, **changes: object) -> CachePlan:
    options: dict[str, object] = {
        "bytes_per_block": BLOCK_BYTES, "block_size": BLOCK_SIZE, "max_num_seqs": 4, "max_num_batched_tokens": 64,
        "max_model_len": 256, "may_shorten": True,
    }  # fmt: skip
    return plan_cache(budget, groups or [FULL], **(options | changes))  # type: ignore[arg-type]


def test_a_budget_buys_blocks_and_the_null_block() -> None:
    assert plan(20 * BLOCK_BYTES) == CachePlan(num_blocks=19, max_model_len=256)
    assert plan(20 * BLOCK_BYTES + BLOCK_BYTES - 1).num_blocks == 19


def test_no_more_than_all_sequences_at_full_length_could_use() -> None:
    assert plan(10**9).num_blocks == 4 * 256 // BLOCK_SIZE


def test_windows_need_no_more_than_they_see() -> None:
    assert plan(10**9, [WINDOW]).num_blocks < plan(10**9, [FULL]).num_blocks
    assert plan(10**9, [FULL, WINDOW]).num_blocks > plan(10**9, [FULL]).num_blocks


def test_a_length_nobody_asked_for_is_shortened(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = plan(11 * BLOCK_BYTES)
    assert found == CachePlan(num_blocks=10, max_model_len=160)
    assert "max_model_len is 160 instead of the model's 256" in caplog.text
    assert "--kv-cache-memory-bytes" in caplog.text


def test_a_length_asked_for_is_not() -> None:
    with pytest.raises(ConfigError, match=r"one sequence of max_model_len 256 needs .*--kv-cache-memory-bytes"):
        plan(11 * BLOCK_BYTES, may_shorten=False)


@pytest.mark.parametrize("budget", [-(10**9), 0, BLOCK_BYTES, 2 * BLOCK_BYTES])
def test_a_budget_for_next_to_nothing_is_refused(budget: int) -> None:
    with pytest.raises(ConfigError, match="KV cache may take"):
        plan(budget)


@given(
    budget=st.integers(0, 200 * BLOCK_BYTES),
    groups=st.lists(st.sampled_from([FULL, WINDOW]), min_size=1, max_size=3),
    max_model_len=st.integers(32, 2000),
    chunk=st.integers(1, 300),
)
def test_one_sequence_always_fits_into_the_budget(
    budget: int, groups: list[CacheGroup], max_model_len: int, chunk: int
) -> None:
    try:
        found = plan(budget, groups, max_model_len=max_model_len, max_num_batched_tokens=chunk)
    except ConfigError:
        return
    needed = blocks_for_sequence(groups, num_tokens=found.max_model_len, chunk=chunk, block_size=BLOCK_SIZE)
    assert needed <= found.num_blocks
    assert (found.num_blocks + 1) * BLOCK_BYTES <= budget
    assert found.max_model_len <= max_model_len


def test_a_budget_that_was_given_is_taken() -> None:
    assert kv_cache_budget(CacheConfig(kv_cache_memory_bytes=3 * MIB), CPU) == 3 * MIB


def test_a_cpu_s_memory_is_not_ours_alone() -> None:
    assert 0 < kv_cache_budget(CacheConfig(), CPU) <= min(CPU_DEFAULT_BYTES, psutil.virtual_memory().total // 2)

from __future__ import annotations

import msgspec
import pytest

from shardwright.cache.spec import CacheGroup, Visibility
from shardwright.config import EngineConfig
from shardwright.errors import ConfigError
from shardwright.parallel.merge import merge
from shardwright.worker.report import ModelFacts, WorkerReport

BLOCK_SIZE = 16
MIB = 1 << 20


def make_report(**changes: object) -> WorkerReport:
    facts = ModelFacts(
        path="/models/m",
        fingerprint="abc",
        model_type="llama",
        architecture="LlamaForCausalLM",
        dtype="float32",
        num_parameters=1000,
        vocab_size=128,
        max_model_len=256,
        eos_token_ids=[2],
    )
    report = WorkerReport(
        facts=facts,
        host="here",
        device="cpu",
        weight_bytes=500,
        num_layers=2,
        groups=[CacheGroup(Visibility(), (0, 1))],
        budget_bytes=MIB,
        bytes_per_block=1024,
        bytes_per_row=0,
        max_step_tokens=None,
        takes_chunks=True,
        reuses_prefixes=True,
        can_rewind=True,
        attention_rung="interface",
        attention_reason="",
        load_s=0.1,
        ready_s=0.2,
    )
    return msgspec.structs.replace(report, **changes)


def config(tp: int = 1, pp: int = 1, **options: object) -> EngineConfig:
    return EngineConfig.from_options(
        "m", tensor_parallel_size=tp, pipeline_parallel_size=pp, block_size=BLOCK_SIZE, max_num_seqs=8, **options
    )


def test_the_rank_with_the_least_room_decides() -> None:
    """Its cache holds 127 blocks beside the null block, of which one sequence of 256 tokens takes 16."""
    reports = [make_report(budget_bytes=MIB), make_report(budget_bytes=MIB // 8)]
    merged = merge(config(tp=2), reports)
    assert merged.info.num_blocks == merged.allocation.num_blocks == 127
    assert merged.info.kv_cache_bytes == 2 * 128 * 1024
    assert merged.info.weight_bytes == 1000
    assert merged.info.rank_weight_bytes == [500, 500]


def test_a_length_that_one_rank_cannot_hold_is_shortened_for_all() -> None:
    reports = [make_report(), make_report(budget_bytes=9 * 1024)]
    merged = merge(config(tp=2), reports)
    assert merged.info.max_model_len == merged.allocation.max_model_len == 8 * BLOCK_SIZE
    with pytest.raises(ConfigError, match="raise --kv-cache-memory-bytes"):
        merge(config(tp=2, max_model_len=256), reports)


def test_what_one_rank_cannot_do_none_does() -> None:
    reports = [make_report(), make_report(takes_chunks=False, reuses_prefixes=False, max_step_tokens=6)]
    info = merge(config(pp=2), reports).info
    assert not info.takes_chunks
    assert not info.reuses_prefixes
    assert info.max_num_seqs == 6


def test_stages_count_their_layers_and_ranks_of_a_stage_share_theirs() -> None:
    reports = [make_report(), make_report(), make_report(num_layers=1, groups=[CacheGroup(Visibility(), (0,))])] * 2
    merged = merge(config(tp=3, pp=2), [*reports[:2], reports[0], *[reports[2]] * 3])
    assert merged.allocation.groups == [CacheGroup(Visibility(), (0, 1, 2))]


def test_ranks_with_other_files_are_refused() -> None:
    other = make_report(host="there", facts=msgspec.structs.replace(make_report().facts, fingerprint="xyz"))
    with pytest.raises(ConfigError, match="rank 1 on there has other files in /models/m than rank 0 on here"):
        merge(config(tp=2), [make_report(), other])

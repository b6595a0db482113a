from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shardwright.bench.run import measure, obstacle, percentiles
from shardwright.bench.start import measure_start
from shardwright.bench.workloads import WORKLOADS, Workload
from shardwright.errors import EngineError
from shardwright.llm import LLM

OPTIONS = {"kv_cache_memory_bytes": 2**24, "dtype": "float32"}


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert percentiles([]) is None


def test_every_token_of_a_workload_is_measured(tiny_llama: Path) -> None:
    workload = dataclasses.replace(WORKLOADS["decode-8"], output_tokens=5).for_vocabulary(128)
    with LLM(str(tiny_llama), **OPTIONS) as llm:
        run = measure(llm, workload)
        assert (len(run.ttft_s), len(run.itl_s)) == (8, 8 * 4)
        assert max(run.ttft_s) < run.elapsed_s
        assert obstacle(WORKLOADS["prefill"], llm) == "needs 1025 tokens a request, but max_model_len is 256"


def test_each_run_starts_with_a_cold_prefix_cache(tiny_llama: Path) -> None:
    workload = Workload(name="w", prompts=[list(range(4, 68))], output_tokens=2)
    with LLM(str(tiny_llama), **OPTIONS) as llm:
        measure(llm, workload)
        measure(llm, workload)
        assert llm.stats.num_prefix_hit_tokens == 0


@pytest.mark.slow
def test_a_start_is_measured_in_a_process_of_its_own(tiny_llama: Path) -> None:
    start = measure_start(str(tiny_llama), OPTIONS)
    assert 0 < start.ready_s <= start.first_token_s
    assert start.peak_rss_mib > 50


@pytest.mark.slow
def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="did not start"):
        measure_start(str(tmp_path), {})

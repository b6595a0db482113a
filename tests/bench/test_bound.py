from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.bench.bound import Weights, step_seconds, workload_seconds
from shardwright.bench.machine import Machine
from shardwright.bench.workloads import WORKLOADS
from shardwright.engine.messages import EngineInfo

MACHINE = Machine(cpu="", cores=2, threads=2, read_gb_per_s=34.0, gemm_gflop_per_s=412.0, gemm_dtype="bfloat16")
WEIGHTS = Weights(num_parameters=134_515_008, num_bytes=269_030_016)


def make_info(path: Path, *, num_parameters: int, weight_bytes: int) -> EngineInfo:
    return EngineInfo(
        model="m",
        path=str(path),
        model_type="llama",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        device="cpu",
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        vocab_size=128,
        max_model_len=256,
        block_size=16,
        num_blocks=1,
        kv_cache_bytes=1,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        attention_rung="interface",
        attention_reason="",
        takes_chunks=True,
    )


def test_few_tokens_are_bound_by_reading_and_many_by_multiplying() -> None:
    assert step_seconds(1, WEIGHTS, MACHINE) == step_seconds(8, WEIGHTS, MACHINE) == pytest.approx(0.0079, rel=0.01)
    assert step_seconds(512, WEIGHTS, MACHINE) == pytest.approx(0.334, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tokens_per_s"),
    [("decode-1", 125), ("mixed-32", 508), ("prefill", 1532), ("shared-prefix", 13100)],
)
def test_a_workload_is_one_prefill_and_its_decode_steps(name: str, tokens_per_s: float) -> None:
    workload = WORKLOADS[name]
    seconds = workload_seconds(workload, WEIGHTS, MACHINE)
    assert workload.num_headline_tokens / seconds == pytest.approx(tokens_per_s, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_only_looked_up_in_is_not_counted(tmp_path: Path, tied: bool) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "vocab_size": 128, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = Weights.of_engine(make_info(tmp_path, num_parameters=20_000, weight_bytes=40_000))
    looked_up = 0 if tied else 64 * 128
    assert weights == Weights(num_parameters=20_000 - looked_up, num_bytes=40_000 - 2 * looked_up)

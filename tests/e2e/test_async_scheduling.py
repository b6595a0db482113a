"""Steps that are planned while others run give what steps do that are planned one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwright import LLM, SamplingParams
from shardwright.errors import ConfigError
from shardwright.outputs import RequestOutput

PROMPTS = [[1, 5, 9, 40], [1, 77], [1, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [1, 5, 9, 41], [1, 90, 91]]
SIZES = {"dtype": "float32", "block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 8}


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> Iterator[tuple[LLM, LLM]]:
    """One that plans ahead, with few blocks and so with preemptions; and one that does not."""
    one_by_one = LLM(str(tiny_llama), max_model_len=64, async_scheduling=False, **SIZES)
    block_bytes = one_by_one.info.kv_cache_bytes // one_by_one.info.num_blocks
    few = {"kv_cache_memory_bytes": 20 * block_bytes, "max_model_len": 64}
    with one_by_one, LLM(str(tiny_llama), async_scheduling=True, **few, **SIZES) as ahead:
        yield ahead, one_by_one
        assert ahead.stats.num_preemptions > 0


def ask(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=30, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.9, seed=3, max_tokens=30, n=2),
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.4, frequency_penalty=0.5, min_tokens=4),
        SamplingParams(temperature=0.8, seed=1, max_tokens=30, stop_token_ids=list(range(0, 128, 5))),
        SamplingParams(temperature=0.8, seed=1, max_tokens=30, stop=["a", "e"]),
    ],
    ids=["greedy", "logprobs", "seeded", "penalties", "stop tokens", "stop strings"],
)
def test_outputs_are_the_same(engines: tuple[LLM, LLM], params: SamplingParams) -> None:
    ahead, one_by_one = engines
    for got, wanted in zip(ask(ahead, params), ask(one_by_one, params), strict=True):
        for own, other in zip(got.outputs, wanted.outputs, strict=True):
            assert (own.token_ids, own.text) == (other.token_ids, other.text)
            assert (own.finish_reason, own.stop_reason) == (other.finish_reason, other.stop_reason)
        assert (got.prompt_logprobs is None) == (wanted.prompt_logprobs is None)
    assert ahead.stats.num_free_blocks == ahead.stats.num_blocks


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"speculative_method": "ngram"}, "speculation"),
        ({"tensor_parallel_size": 2}, "one rank"),
        ({"distributed_executor_backend": "mp"}, "one rank"),
    ],
)
def test_what_cannot_run_ahead_is_refused(tiny_llama: Path, options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        LLM(str(tiny_llama), async_scheduling=True, **options)

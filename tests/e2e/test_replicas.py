"""Replicas of a real model: streams that outlive the core they began on, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import httpx
import psutil
import pytest
from tests.server.process import ServerProcess, free_port

from shardwright import LLM, AsyncLLM, SamplingParams
from shardwright.errors import EngineDeadError

pytestmark = pytest.mark.slow  # cores take seconds to start

OPTIONS: dict[str, object] = {"dtype": "float32", "kv_cache_memory_bytes": "4MiB", "block_size": 4}
PROMPTS = [[4 + (7 * i + 3 * j) % 120 for j in range(12)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1, seed=5, max_tokens=200, ignore_eos=True, repetition_penalty=1.1, logprobs=1)
PARAMS = [GREEDY, SAMPLED] * 3


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    with LLM(str(tiny_llama), **OPTIONS) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def cores(pid: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
    return sorted(found, key=lambda process: process.create_time())


async def tokens_of(llm: AsyncLLM, index: int, begun: asyncio.Semaphore | None = None) -> list[int]:
    tokens: list[int] = []
    async for output in llm.generate({"prompt_token_ids": PROMPTS[index]}, PARAMS[index], stream="delta"):
        if not tokens and begun is not None:
            begun.release()
        tokens += output.outputs[0].token_ids
        if PARAMS[index].logprobs is not None:
            assert len(output.outputs[0].logprobs or []) == len(output.outputs[0].token_ids)
    return tokens


async def until_both_are_up(llm: AsyncLLM) -> None:
    for _ in range(1200):
        if all(is_up for _, is_up in llm.replica_stats):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the replica does not come back")


async def test_a_killed_core_changes_no_stream_and_comes_back(tiny_llama: Path, expected: list[list[int]]) -> None:
    before = cores()
    llm = AsyncLLM(str(tiny_llama), data_parallel_size=2, **OPTIONS)
    try:
        for _ in range(2):  # first the one, then, as it is the older one now, the other
            begun = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(tokens_of(llm, index, begun)) for index in range(len(PROMPTS))]
            for _ in tasks:
                await begun.acquire()
            assert [stats.num_running for stats, _ in llm.replica_stats] == [3, 3]
            next(core for core in cores() if core not in before).kill()
            assert await asyncio.gather(*tasks) == expected
            assert llm.is_alive
            await until_both_are_up(llm)
        assert sum(stats.num_restarts for stats, _ in llm.replica_stats) == 2
        assert await asyncio.gather(*(tokens_of(llm, index) for index in range(len(PROMPTS)))) == expected
        assert min(stats.num_steps for stats, _ in llm.replica_stats) > 0
    finally:
        llm.close()
    assert cores() == before


async def test_the_loss_of_all_cores_ends_streams_with_the_reason(tiny_llama: Path) -> None:
    before = cores()
    llm = AsyncLLM(str(tiny_llama), data_parallel_size=2, **OPTIONS)
    try:
        stream = llm.generate({"prompt_token_ids": PROMPTS[0]}, GREEDY, stream="delta")
        await anext(stream)
        for core in [core for core in cores() if core not in before]:
            core.kill()
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            async for _ in stream:
                pass
        assert not llm.is_alive
    finally:
        llm.close()
    assert cores() == before


def test_llm_with_replicas_gives_the_same_tokens_and_outlives_one(tiny_llama: Path, expected: list[list[int]]) -> None:
    before = cores()
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with LLM(str(tiny_llama), data_parallel_size=2, **OPTIONS) as llm:
        tokens: list[list[int]] = [[] for _ in PROMPTS]
        for index, delta in llm.stream(prompts, PARAMS):
            if not any(tokens):
                next(core for core in cores() if core not in before).kill()
            assert len(delta.outputs) == 1
            tokens[index] += delta.outputs[0].token_ids
        assert tokens == expected
        assert llm.stats.num_restarts == 1
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    assert cores() == before


def test_a_server_with_replicas_counts_each_and_ends_both(tiny_llama: Path) -> None:
    port = free_port()
    command = ["-m", "shardwright", "serve", str(tiny_llama), "--port", str(port), "-dp", "2"]
    server = ServerProcess(*command, "--kv-cache-memory-bytes", "4MiB", port=port)
    try:
        server.wait_until_ready(240)
        for prompt in ("abc", "Once upon a time there was"):
            body = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        values = server.metrics()
        assert [values[f'engine_up{{replica="{index}"}}'] for index in range(2)] == [1, 1]
        assert all(values[f'engine_steps_total{{replica="{index}"}}'] >= 5 for index in range(2))
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(cores(server.process.pid)) == 2
        server.process.send_signal(signal.SIGINT)
        code, _, err = server.end(60)
        assert code == 0, err
        assert "Traceback" not in err
        assert psutil.wait_procs(children, timeout=10)[1] == []
    finally:
        server.kill()


def test_texts_are_embedded_by_all_replicas(tiny_llama: Path) -> None:
    options = {"dtype": "float32", "task": "embed"}
    with LLM(str(tiny_llama), **options) as llm:
        expected = [output.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]
    with LLM(str(tiny_llama), data_parallel_size=2, **options) as llm:
        outputs = llm.embed(PROMPTS, use_tqdm=False)
        assert llm.stats.num_computed_tokens == sum(map(len, PROMPTS))
    assert [output.embedding for output in outputs] == [pytest.approx(one, abs=1e-5) for one in expected]

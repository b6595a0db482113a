"""The engine core in its own process: streams, aborts, and what happens when either side dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from shardwright import LLM, AsyncLLM, SamplingParams
from shardwright.errors import CheckpointError, ConfigError, EngineDeadError, RequestError, ShardwrightError
from shardwright.outputs import FinishReason

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]  # a core takes seconds to start

OPTIONS: dict[str, object] = {"dtype": "float32", "kv_cache_memory_bytes": "8MiB", "block_size": 4}
PROMPT = list(range(10, 30))
LONG = SamplingParams(temperature=0, max_tokens=230, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(autouse=True, scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where engines keep their sockets; for the module's own engines only."""
    directory = tmp_path_factory.mktemp("ipc")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tempfile, "tempdir", str(directory))
        yield directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_llama: Path) -> AsyncIterator[AsyncLLM]:
    """One engine for the tests that leave it as they found it."""
    llm = AsyncLLM(str(tiny_llama), **OPTIONS)
    yield llm
    assert llm.is_alive
    llm.close()


def cores() -> set[psutil.Process]:
    """Core processes of this one."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("spawn_main" in word for word in child.cmdline()):
                found.add(child)
    return found


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.02)


async def tokens_of(llm: AsyncLLM, prompt: list[int], params: SamplingParams = SHORT) -> list[int]:
    tokens: list[int] = []
    async for output in llm.generate({"prompt_token_ids": prompt}, params, stream="delta"):
        tokens += output.outputs[0].token_ids
    return tokens


def is_idle(llm: AsyncLLM) -> bool:
    return llm.stats.num_free_blocks == llm.stats.num_blocks > 0 and llm.stats.num_running == 0


async def test_many_streams_at_once_give_each_its_own(engine: AsyncLLM, tiny_llama: Path) -> None:
    prompts = [[4 + (7 * i + 3 * j) % 120 for j in range(3 + i % 11)] for i in range(80)]
    with LLM(str(tiny_llama), **OPTIONS) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], SHORT, use_tqdm=False)
    assert await asyncio.gather(*(tokens_of(engine, p) for p in prompts)) == [o.outputs[0].token_ids for o in outputs]
    assert engine.num_unfinished == 0
    assert is_idle(engine)


async def test_cumulative_streams_grow_to_what_deltas_add_up_to(engine: AsyncLLM) -> None:
    seen: list[list[int]] = []
    async for output in engine.generate({"prompt_token_ids": PROMPT}, SHORT):
        seen.append(list(output.outputs[0].token_ids))
    assert seen[-1] == await tokens_of(engine, PROMPT)
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(seen))


async def test_abort_ends_the_stream_and_frees_its_blocks(engine: AsyncLLM) -> None:
    stream = engine.generate({"prompt_token_ids": PROMPT}, LONG, request_id="abort-me")
    await anext(stream)
    await engine.abort("abort-me")
    last = [output async for output in stream][-1]
    assert last.finished
    assert last.outputs[0].finish_reason == FinishReason.ABORT
    await until(lambda: is_idle(engine))
    await engine.abort("abort-me")  # nobody by that name any more


async def test_leaving_a_stream_frees_its_blocks(engine: AsyncLLM) -> None:
    stream = engine.generate({"prompt_token_ids": PROMPT}, LONG)
    await anext(stream)
    await stream.aclose()
    assert engine.num_unfinished == 0
    await until(lambda: is_idle(engine))


async def test_cancelling_a_task_frees_its_blocks(engine: AsyncLLM) -> None:
    tasks = [asyncio.create_task(tokens_of(engine, [*PROMPT, i], LONG)) for i in range(8)]
    await until(lambda: engine.stats.num_running > 0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)
    await until(lambda: is_idle(engine))


async def test_a_slow_consumer_delays_nobody_and_misses_nothing(engine: AsyncLLM) -> None:
    expected = await tokens_of(engine, PROMPT, LONG)
    stream = engine.generate({"prompt_token_ids": PROMPT}, LONG, stream="delta")
    tokens = list((await anext(stream)).outputs[0].token_ids)
    others = await asyncio.gather(*(tokens_of(engine, [*PROMPT, i]) for i in range(4)))
    assert all(len(other) == SHORT.max_tokens for other in others)
    await until(lambda: is_idle(engine))  # its tokens are computed, and wait for it
    async for output in stream:
        tokens += output.outputs[0].token_ids
        await asyncio.sleep(0)
    assert tokens == expected


async def test_refused_requests_leave_nothing_behind(engine: AsyncLLM) -> None:
    with pytest.raises(RequestError, match="128"):
        await anext(engine.generate({"prompt_token_ids": [5, 128]}))
    with pytest.raises(RequestError, match="256"):
        await anext(engine.generate({"prompt_token_ids": [5] * 300}))
    running = engine.generate({"prompt_token_ids": PROMPT}, LONG, request_id="taken")
    await anext(running)
    with pytest.raises(RequestError, match="taken"):
        await anext(engine.generate({"prompt_token_ids": PROMPT}, LONG, request_id="taken"))
    assert engine.num_unfinished == 1
    await running.aclose()
    await until(lambda: is_idle(engine))


async def test_signals_to_the_whole_group_leave_the_core_to_its_parent(engine: AsyncLLM) -> None:
    [core] = cores()
    core.send_signal(signal.SIGINT)
    core.send_signal(signal.SIGTERM)
    assert len(await tokens_of(engine, PROMPT)) == SHORT.max_tokens


async def test_a_killed_core_ends_its_streams_at_once(tiny_llama: Path, sockets: Path) -> None:
    others, directories = cores(), set(sockets.iterdir())
    llm = AsyncLLM(str(tiny_llama), **OPTIONS)
    streams = [llm.generate({"prompt_token_ids": [*PROMPT, i]}, LONG, stream="delta") for i in range(3)]
    for stream in streams:
        await anext(stream)
    [core] = cores() - others
    core.kill()
    started = time.monotonic()
    for stream in streams:
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            async for _ in stream:
                pass
    assert time.monotonic() - started < 2
    assert not llm.is_alive
    assert llm.num_unfinished == 0
    with pytest.raises(EngineDeadError, match="killed by signal 9"):
        await anext(llm.generate({"prompt_token_ids": PROMPT}))
    llm.close()
    llm.close()
    assert cores() == others
    assert set(sockets.iterdir()) == directories


async def test_a_request_just_after_the_core_was_killed_does_not_wait_for_it(tiny_llama: Path) -> None:
    others = cores()
    llm = AsyncLLM(str(tiny_llama), **OPTIONS)
    await tokens_of(llm, PROMPT)
    [core] = cores() - others
    core.kill()
    while core.status() != psutil.STATUS_ZOMBIE:  # the event loop must not see its end before the request comes
        time.sleep(0.01)
    with pytest.raises(EngineDeadError, match="killed by signal 9"):
        await asyncio.wait_for(tokens_of(llm, PROMPT), 5)
    llm.close()
    assert cores() == others


async def test_closing_ends_streams_and_the_core(tiny_llama: Path, sockets: Path) -> None:
    others, directories = cores(), set(sockets.iterdir())
    llm = AsyncLLM(str(tiny_llama), **OPTIONS)
    stream = llm.generate({"prompt_token_ids": PROMPT}, LONG, stream="delta")
    await anext(stream)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        async for _ in stream:
            pass
    assert not llm.is_alive
    assert cores() == others
    assert set(sockets.iterdir()) == directories


async def test_a_core_that_dies_while_it_starts_is_noticed(tiny_llama: Path, sockets: Path) -> None:
    others, directories = cores(), set(sockets.iterdir())
    start = asyncio.create_task(asyncio.to_thread(AsyncLLM, str(tiny_llama), **OPTIONS))
    await until(lambda: bool(cores() - others))
    for core in cores() - others:
        core.kill()
    with pytest.raises(EngineDeadError, match="killed by signal 9"):
        await start
    assert set(sockets.iterdir()) == directories


@pytest.mark.parametrize(
    ("kind", "options"), [(CheckpointError, {}), (ConfigError, {"load_format": "dummy", "max_model_len": 100_000})]
)
async def test_what_the_core_refuses_reaches_the_parent_as_it_was(
    tiny_llama: Path, tmp_path: Path, sockets: Path, kind: type[ShardwrightError], options: dict[str, object]
) -> None:
    others, directories = cores(), set(sockets.iterdir())
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"too short")
    with pytest.raises(kind) as inline:
        LLM(str(model), **(OPTIONS | options))
    with pytest.raises(kind) as apart:
        AsyncLLM(str(model), **(OPTIONS | options))
    assert str(apart.value) == str(inline.value)
    assert cores() == others
    assert set(sockets.iterdir()) == directories


PARENT = """
import asyncio, sys
import psutil
from shardwright import AsyncLLM, SamplingParams

async def main():
    llm = AsyncLLM(sys.argv[1], dtype="float32", kv_cache_memory_bytes="8MiB")
    async for _ in llm.generate([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True)):
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        if sys.argv[2] == "busy":
            await asyncio.sleep(60)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_a_core_whose_parent_was_killed_ends_too(
    tiny_llama: Path, tmp_path: Path, sockets: Path, state: str
) -> None:
    directories = set(sockets.iterdir())
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tiny_llama), state],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(sockets)},
    )  # fmt: skip
    assert parent.stdout is not None
    try:
        pids = (await asyncio.to_thread(parent.stdout.readline)).split()
        children = [psutil.Process(int(pid)) for pid in pids]
        assert children
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    await until(lambda: not any(child.is_running() for child in children))
    assert set(sockets.iterdir()) == directories


FORGETFUL = """
import sys
from shardwright import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", kv_cache_memory_bytes="8MiB", data_parallel_size=2)
    outputs = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    print(len(outputs[0].outputs[0].token_ids), *(child.pid for child in __import__("psutil").Process().children()))
"""


async def test_a_program_that_forgets_to_close_its_engine_ends_all_the_same(
    tiny_llama: Path, tmp_path: Path, sockets: Path
) -> None:
    directories = set(sockets.iterdir())
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(tmp_path / "forgetful.py"), str(tiny_llama)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"TMPDIR": str(sockets)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_tokens, *pids = map(int, done.stdout.split())
    assert num_tokens == 5
    assert len(pids) >= 2
    await until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert set(sockets.iterdir()) == directories

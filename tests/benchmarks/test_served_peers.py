from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator

import pytest
from tests.bench.streams import Script, serving

from shardwright.bench.bound import Weights
from shardwright.bench.http_stream import Server
from shardwright.bench.machine import Machine

MACHINE = Machine(cpu="", cores=2, threads=2, read_gb_per_s=10.0, gemm_gflop_per_s=100.0, gemm_dtype="float32")
WEIGHTS = Weights(num_parameters=1000, num_bytes=2000)


@pytest.fixture
def servers() -> Iterator[dict[str, Server]]:
    """A quick one and a slow one."""
    ready: queue.Queue[dict[str, Server]] = queue.Queue()
    over = threading.Event()

    async def serve() -> None:
        async with serving(Script(delay_s=0.001)) as quick, serving(Script(delay_s=0.02)) as slow:
            ready.put({"shardwright": quick, "vllm": slow})
            while not over.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    yield ready.get()
    over.set()
    thread.join()


def test_each_server_gets_the_same_loads_in_turns(servers: dict[str, Server]) -> None:
    from served_peers import Shape, as_markdown, run

    shape = Shape(rates=[100.0, 300.0], num_requests=5, prompt_tokens=4, output_tokens=3, rounds=2)
    rows = run(servers, shape, vocab_size=50, weights=WEIGHTS, machine=MACHINE)
    assert [row["rate"] for row in rows] == [100.0, 300.0]
    for row in rows:
        assert {name: len(rounds) for name, rounds in row["rounds"].items()} == {"shardwright": 2, "vllm": 2}
        quick, slow = row["best"]["shardwright"], row["best"]["vllm"]
        assert quick["latency_s"]["p50"] < slow["latency_s"]["p50"]
        assert quick["failed"] == slow["failed"] == 0
    lines = as_markdown(rows, shape)
    assert sum(line.startswith(("| 100 |", "| 300 |")) for line in lines) == 4


def test_no_round_begins_with_what_another_left_in_the_cache() -> None:
    from served_peers import Shape

    shape = Shape(rates=[1.0, 2.0], num_requests=3, prompt_tokens=4, output_tokens=1, rounds=2)
    prompts = [tuple(prompt) for turn in range(2) for load in shape.loads(turn) for prompt in load.prompts(None)]
    assert len(set(prompts)) == 12

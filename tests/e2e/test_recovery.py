"""A served model whose ranks are killed while clients stream: nobody but the log and the metrics notices."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from tests.server.process import ServerProcess, free_port

pytestmark = pytest.mark.slow  # ranks take seconds to start, and again after each loss

START_TIMEOUT_S = 240
PROMPTS = ["Once upon a time", "The cat sat on", "Why is it so"]
OPTIONS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 0}]


@pytest.fixture(scope="module", params=["--tensor-parallel-size", "--pipeline-parallel-size"])
def server(tiny_llama: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    port = free_port()
    command = ["-m", "shardwright", "serve", str(tiny_llama), "--port", str(port), "--served-model-name", "tiny"]
    options = ["--kv-cache-memory-bytes", "4MiB", "--dtype", "float32", request.param, "2"]
    server = ServerProcess(*command, *options, port=port)
    try:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server
    finally:
        server.kill()


def ranks(server: ServerProcess) -> list[psutil.Process]:
    """The processes of the ranks, by number."""
    found = {}
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            words = child.cmdline()
            if "shardwright.parallel.rank" in words:
                found[int(words[words.index("shardwright.parallel.rank") + 1])] = child
    return [found[number] for number in sorted(found)]


class Stream(threading.Thread):
    """A client that streams one completion."""

    def __init__(self, server: ServerProcess, index: int) -> None:
        super().__init__()
        self.text = ""
        self.has_begun = threading.Event()
        self._url = f"{server.url}/v1"
        self._index = index
        self.start()

    def run(self) -> None:
        with OpenAI(base_url=self._url, api_key="none", max_retries=0, timeout=START_TIMEOUT_S) as client:
            chunks = client.completions.create(
                model="tiny",
                prompt=PROMPTS[self._index],
                max_tokens=230,
                stream=True,
                extra_body={"ignore_eos": True},
                **OPTIONS[self._index],
            )
            for chunk in chunks:
                self.text += chunk.choices[0].text
                self.has_begun.set()


def stream_all(server: ServerProcess, kill: int | None = None) -> list[str]:
    """Texts of all prompts, streamed together; a rank may be killed once all have begun."""
    streams = [Stream(server, index) for index in range(len(PROMPTS))]
    if kill is not None:
        for stream in streams:
            assert stream.has_begun.wait(30)
        ranks(server)[kill].kill()
        while any(stream.is_alive() for stream in streams):
            assert httpx.get(f"{server.url}/health").status_code == 200
            time.sleep(0.2)
    for stream in streams:
        stream.join()
    return [stream.text for stream in streams]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_changes_nothing_that_clients_see(server: ServerProcess, rank: int) -> None:
    undisturbed = stream_all(server)
    assert all(len(text) > 100 for text in undisturbed)
    before = server.metrics()["engine_restarts_total"]
    assert stream_all(server, kill=rank) == undisturbed
    assert server.metrics()["engine_restarts_total"] == before + 1


def test_the_server_ends_without_leaving_a_process_behind(server: ServerProcess) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(ranks(server)) == 2
    server.process.send_signal(signal.SIGINT)
    code, _, err = server.end(60)
    assert code == 0, err
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=10)[1] == []

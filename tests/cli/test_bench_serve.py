"""`bench serve` with a real server of a tiny model, and with one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import psutil
import pytest
from tests.bench.streams import Script, serving

if TYPE_CHECKING:
    from tests.cli.conftest import Result

Shardwright: TypeAlias = "Callable[..., Result]"

SMALL = ("--num-requests", "12", "--prompt-tokens", "8", "--output-tokens", "4")


@pytest.fixture
def scripted() -> Iterator[str]:
    """Address of a server that answers with tokens, in a thread; after eight of a request it fails."""
    address: queue.Queue[str] = queue.Queue()
    over = threading.Event()

    async def serve() -> None:
        async with serving(Script(delay_s=0.002, error_after=8)) as server:
            address.put(server.url)
            while not over.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    yield address.get()
    over.set()
    thread.join()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "no model: name one to serve"),
        (("m", "--rate", "0"), "the rate is 0"),
        (
            ("m", "--url", "http://127.0.0.1:1", "--max-num-seqs", "2"),
            "--max-num-seqs is for a server started here",
        ),
        (("/no/such/model",), "/no/such/model"),
    ],
)
@pytest.mark.usefixtures("quick_machine")
def test_wrong_usage_is_told_before_anything_runs(
    shardwright: Shardwright, arguments: tuple[str, ...], complaint: str
) -> None:
    result = shardwright("bench", "serve", *arguments)
    assert (result.code, result.stdout) == (2, "")
    assert complaint in result.stderr.splitlines()[-1]


@pytest.mark.usefixtures("quick_machine")
def test_a_server_that_is_not_there_is_told(shardwright: Shardwright) -> None:
    result = shardwright("bench", "serve", "--url", "http://127.0.0.1:1")
    assert (result.code, result.stdout) == (1, "")
    assert "no server answers at http://127.0.0.1:1" in result.stderr.splitlines()[-1]


@pytest.mark.usefixtures("quick_machine")
def test_a_running_server_gets_a_load_at_each_rate(shardwright: Shardwright, scripted: str) -> None:
    command = ("bench", "serve", "--url", f"{scripted}/v1", *SMALL, "--rate", "50", "--rate", "200")
    document = shardwright(*command, "--json").json
    assert [row["name"] for row in document["workloads"]] == ["serve-50", "serve-200"]
    assert document["model"] == "scripted"
    for row in document["workloads"]:
        assert (row["requests"], row["failed"], row["unfinished"]) == (12, 0, 0)
        assert (row["prompt_tokens"], row["output_tokens"]) == (12 * 8, 12 * 4)
        assert set(row["ttft_s"]) == set(row["itl_s"]) == set(row["latency_s"]) == {"p50", "p90", "p99"}
        assert row["bound_tokens_per_s"] is None  # nobody told how large the model is
    table = shardwright(*command)
    assert table.code == 0
    assert "scripted; latencies in ms" in table.stdout
    assert "12/12" in table.stderr


@pytest.mark.usefixtures("quick_machine")
def test_requests_longer_than_the_model_takes_are_refused(shardwright: Shardwright, scripted: str) -> None:
    result = shardwright("bench", "serve", "--url", scripted, "--prompt-tokens", "62", "--output-tokens", "4")
    assert result.code == 2
    assert "66 tokens, but max_model_len is 64" in result.stderr


@pytest.mark.usefixtures("quick_machine")
def test_failed_requests_are_counted_and_end_in_exit_code_1(shardwright: Shardwright, scripted: str) -> None:
    result = shardwright("bench", "serve", "--url", scripted, *SMALL, "--output-tokens", "9", "--rate", "100", "--json")
    assert result.code == 1
    assert result.json["workloads"][0]["failed"] == 12
    assert "12 of 12 requests at 100/s failed" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_machine")
def test_ctrl_c_ends_the_real_server_and_prints_what_was_measured(shardwright: Shardwright, tiny_llama: Path) -> None:
    others = set(psutil.Process().children(recursive=True))  # of other tests in this process
    children: list[psutil.Process] = []
    is_over = threading.Event()

    def press_ctrl_c() -> None:
        while not is_over.wait(0.1) and num_connections(children) == 0:
            children[:] = set(psutil.Process().children(recursive=True)) - others
        if not is_over.wait(2):  # the first load takes a third of a second, the second a minute
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    try:
        engine = ("--kv-cache-memory-bytes", "16MiB", "--enforce-eager", "--no-self-check")
        result = shardwright(
            "bench", "serve", str(tiny_llama), *engine, *SMALL, "--rate", "40", "--rate", "0.2", "--json"
        )
    finally:
        is_over.set()
        thread.join()
    assert result.code == 130, result.stderr
    assert result.json["interrupted"]
    first, second = result.json["workloads"]
    assert (first["requests"], first["failed"], first["unfinished"], first["output_tokens"]) == (12, 0, 0, 48)
    assert 0 < first["fraction_of_bound"] < 1
    assert first["ttft_s"]["p50"] < first["latency_s"]["p50"]
    assert 1 <= second["requests"] < 12
    assert children
    assert not psutil.wait_procs(children, timeout=5)[1]


def num_connections(servers: list[psutil.Process]) -> int:
    """Connections that a client has made so far."""
    found = 0
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):  # a compiler, say, that has ended since
            connections = server.net_connections(kind="tcp4")
            found += sum(connection.status == psutil.CONN_ESTABLISHED for connection in connections)
    return found

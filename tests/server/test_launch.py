from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.server.process import ServerProcess, free_port

from shardwright.config import EngineConfig
from shardwright.errors import ConfigError
from shardwright.server import ServerConfig, serve
from shardwright.server.launch import bind, listen

PROGRAM = """
import asyncio, logging, sys
from shardwright.server import ServerConfig
from shardwright.server.launch import bind, run
from tests.server.fake_engine import AlphabetEngine

class SlowEngine(AlphabetEngine):
    async def generate(self, *args, **options):
        async for output in super().generate(*args, **options):
            await asyncio.sleep(0.05)
            yield output

logging.basicConfig(level=logging.INFO)
config = ServerConfig(port=int(sys.argv[1]), drain_timeout_s=float(sys.argv[2]))
run(SlowEngine(), config, bind(config.host, config.port))
print("ended well")
"""

Start = Callable[..., ServerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers around the alphabet engine, at 20 tokens per second."""
    started: list[ServerProcess] = []

    def make(*, drain_timeout_s: float = 20) -> ServerProcess:
        port = free_port()
        started.append(ServerProcess("-c", PROGRAM, str(port), str(drain_timeout_s), port=port))
        started[-1].wait_until_ready()
        return started[-1]

    yield make
    for one in started:
        one.kill()


def stream(server: ServerProcess, max_tokens: int) -> Iterator[str]:
    body = {"prompt": "a", "max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
        yield from (line for line in response.iter_lines() if line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_finish_and_refuses_new_ones(start: Start, number: signal.Signals) -> None:
    server = start()
    lines = stream(server, max_tokens=20)
    next(lines)
    server.process.send_signal(number)
    time.sleep(0.2)
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    rest = list(lines)
    assert len(rest) == 20
    assert rest[-1] == "data: [DONE]"
    code, out, err = server.end()
    assert (code, out) == (0, "ended well\n")
    assert f"ready on {server.url}" in err


def test_requests_that_outlast_the_drain_are_told(start: Start) -> None:
    server = start(drain_timeout_s=0.3)
    lines = stream(server, max_tokens=60)
    next(lines)
    server.process.terminate()
    assert "shut down before this request was finished" in list(lines)[-1]
    assert server.end()[0] == 0


def test_second_signal_stops_at_once(start: Start) -> None:
    server = start()
    lines = stream(server, max_tokens=60)
    next(lines)
    server.process.terminate()
    time.sleep(0.2)
    began = time.monotonic()
    server.process.terminate()
    list(lines)
    assert server.end()[0] == 0
    assert time.monotonic() - began < 1.5


def test_idle_server_ends_at_once(start: Start) -> None:
    server = start()
    began = time.monotonic()
    server.process.terminate()
    assert server.end()[0] == 0
    assert time.monotonic() - began < 1.5


def test_taken_port_is_told_before_the_model_is_looked_for() -> None:
    with bind("127.0.0.1", 0) as taken:
        listen(taken)
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use: .*--port"):
            serve(EngineConfig.from_options("/no/such/model"), ServerConfig(port=port))


def test_broken_certificate_is_told_before_the_model_is_looked_for(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    config = ServerConfig(port=0, ssl_certfile=str(broken), ssl_keyfile=str(broken))
    with pytest.raises(ConfigError, match="PEM"):
        serve(EngineConfig.from_options("/no/such/model"), config)


def test_two_that_start_together_are_told_when_they_listen() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:
            listen(first)
            with pytest.raises(ConfigError, match="in use"):
                listen(second)


def test_host_that_is_not_ours_is_told() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="cannot be listened on"):
        bind("no such host", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6_addresses_can_be_bound() -> None:
    with bind("::1", 0) as sock:
        assert sock.family == socket.AF_INET6

"""The same Poisson load at the HTTP servers of several engines, in turns: a part of `peers.py`.

Each engine has a server of its own that lives through the run; the client, shardwright's (`bench/served.py`), talks to
one at a time. Who begins changes from round to round; prompts are new in each, and the same for all engines.

Not here: `transformers serve`, which takes no token ids and stops at end-of-sequence, so that it would do other work;
llama.cpp's server, which is not in llama-cpp-python (the one there answers one request at a time).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import table, title

from shardwright.bench.bound import Weights
from shardwright.bench.http_stream import Server, StreamError
from shardwright.bench.load import Load, loads
from shardwright.bench.machine import Machine
from shardwright.bench.served import Served, offer, read_card, served_as_json, warm_up
from shardwright.bench.server_process import stop

READY_TIMEOUT_S = 600
PAUSE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is asked for at every rate."""

    rates: Sequence[float]
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    rounds: int

    def loads(self, turn: int) -> list[Load]:
        """The loads of one round, with prompts that no other round has."""
        return loads(
            list(self.rates),
            num_requests=self.num_requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            seed=turn,
            first_prompt=turn * len(self.rates) * self.num_requests,
        )


def commands(model: str, dtype: str, *, vllm: Path | None) -> dict[str, list[str]]:
    """How each engine's server is started, all but its port."""
    common = ["--host", "127.0.0.1", "--dtype", dtype]
    found = {"shardwright": [sys.executable, "-m", "shardwright", "serve", model, *common]}
    if vllm is not None:  # the module, since `vllm serve` looks for a package called vllm, and that for CPUs is not
        limits = ["--max-model-len", "2048", "--max-num-seqs", "64"]
        found["vllm"] = [str(vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", model, *common, *limits]
    return found


@contextlib.contextmanager
def serving(name: str, command: list[str], *, logs: Path) -> Iterator[Server]:
    """A server on a free port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = logs / f"{name}-server.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        wait_until_ready(name, process, server, path)
        yield server
    finally:
        stop(process)


def wait_until_ready(name: str, process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    """Ask until the server lists its model. Raises SystemExit with the end of its log if it ends, or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(StreamError):
            asyncio.run(read_card(server))
            return
        time.sleep(PAUSE_S)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise SystemExit(f"error: the server of {name} is not ready; the end of its log:\n{tail}")


def run(
    servers: dict[str, Server], shape: Shape, *, vocab_size: int, weights: Weights, machine: Machine
) -> list[dict[str, Any]]:
    """One row for each rate: of every engine, the round in which requests took least, and all rounds beside it."""
    names = list(servers)
    cards = {name: asyncio.run(read_card(server)) for name, server in servers.items()}
    for name, server in servers.items():
        asyncio.run(warm_up(server, cards[name].id, prompt_tokens=shape.prompt_tokens, vocab_size=vocab_size))
    rows: dict[float, dict[str, list[dict[str, Any]]]] = {rate: {name: [] for name in names} for rate in shape.rates}
    for turn in range(shape.rounds):
        shift = turn % len(names)
        for load in shape.loads(turn):
            for name in names[shift:] + names[:shift]:
                served = Served.of(load)
                asyncio.run(offer(servers[name], cards[name].id, served, vocab_size=vocab_size))
                row = served_as_json(served, weights=weights, machine=machine)
                rows[load.rate][name].append(row)
                print(f"{load.name}, {name}: {row['latency_s']}, {row['failed']} failed", file=sys.stderr, flush=True)
    return [
        {"rate": rate, "best": {name: min(found[name], key=median_latency) for name in names}, "rounds": found}
        for rate, found in rows.items()
    ]


def median_latency(row: dict[str, Any]) -> float:
    """Of a row's requests, in seconds; a load of which no request was served takes for ever."""
    return float(row["latency_s"]["p50"]) if row["latency_s"] else float("inf")


def as_markdown(rows: list[dict[str, Any]], shape: Shape) -> list[str]:
    """The table, one line for each rate and engine."""
    header = ["requests/s", "engine", "sent", "failed", "tokens/s", *TIMES.values()]
    lines = [
        [
            f"{row['rate']:g}",
            title(name),
            "-" if best["offered_rate"] is None else f"{best['offered_rate']:.2f}",
            str(best["failed"]),
            f"{best['output_tokens_per_s']:.1f}",
            *(in_ms(best[key]) for key in TIMES),
        ]
        for row in rows
        for name, best in row["best"].items()
    ]
    what = f"{shape.num_requests} requests of {shape.prompt_tokens} + {shape.output_tokens} tokens at each rate"
    return [f"Served: {what}; best of {shape.rounds} rounds; p50 / p99.", "", *table(header, lines)]


TIMES = {"ttft_s": "first token, ms", "itl_s": "between tokens, ms", "latency_s": "whole answer, ms"}


def in_ms(percentiles: dict[str, float] | None) -> str:
    """The median and the worst."""
    return "-" if percentiles is None else f"{percentiles['p50'] * 1000:.0f} / {percentiles['p99'] * 1000:.0f}"

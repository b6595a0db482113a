"""Ranks as processes of this machine.

Each is a fresh interpreter. Its standard error, and what it prints, come out here line by line with its number in
front. It ends with this process, whatever ends this one, and its own end is seen at once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import IO, TypeVar

import msgspec

from shardwright import errors
from shardwright.config import EngineConfig
from shardwright.errors import RanksLostError, ShardwrightError, UsageError
from shardwright.parallel.channel import Replies, RingWriter, make_memory
from shardwright.parallel.messages import (
    Allocate,
    Allocated,
    Command,
    Failed,
    Load,
    Loaded,
    Opened,
    Reply,
    Step,
    Stepped,
    Stop,
)
from shardwright.parallel.setup import make_setup
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.placement import Placement
from shardwright.worker.report import Allocation, WorkerReport

HOST = "127.0.0.1"

STEP_TIMEOUT_S = 600.0
"""A rank that has not finished a step by then hangs."""

STOP_TIMEOUT_S = 2.0
"""How long ranks may take to end before they are killed."""

POLL_S = 0.5

LAST_WORDS_S = 0.5
"""After the first sign of trouble, how long the others may take to say what the trouble is: the first is often a rank
that has lost its connection to the one that died."""

R = TypeVar("R", Opened, Loaded, Allocated, Stepped)

_encode = msgspec.msgpack.Encoder().encode
_DECODER: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class MpRanks:
    """Implements Ranks.

    Args:
        config: of the engine.

    Raises: RanksLostError if they do not start.
    """

    def __init__(self, config: EngineConfig) -> None:
        num_ranks = config.parallel.num_ranks
        ring = make_memory(num_ranks)
        life_read, life_write = os.pipe()
        pairs = [socket.socketpair() for _ in range(num_ranks)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets = [ours for ours, _ in pairs]
        self._writer = RingWriter(ring, self._sockets)
        self._replies = Replies(self._sockets)
        self._inbox: list[tuple[int, Reply]] = []
        self._lost: str | None = None
        """Why the ranks are gone."""
        self._is_serving = False
        self._port = 0
        self._end = weakref.finalize(self, _end, self._processes, life_write)
        try:
            for rank, (_, theirs) in enumerate(pairs):
                self._processes.append(start_process(rank, num_ranks, (ring, theirs.fileno(), life_read)))
        finally:
            for descriptor in (ring, life_read):
                os.close(descriptor)
            for _, theirs in pairs:
                theirs.close()
        self._printer = print_lines([process.stdout for process in self._processes if process.stdout is not None])
        try:
            self._send(make_setup(config, placements_of(config), host=HOST))
            self._port = self._wait(Opened, count=1)[0].port
        except BaseException:
            self.close()
            raise

    def load(self, config: EngineConfig) -> list[WorkerReport]:
        self._is_serving = False
        self._send(Load(config=config, port=self._port))
        return [reply.report for reply in self._wait(Loaded, count=len(self._processes))]

    def allocate(self, allocation: Allocation) -> None:
        self._send(Allocate(allocation))
        self._wait(Allocated, count=len(self._processes))
        self._is_serving = True

    def submit(self, batch: Batch) -> None:
        self._send(Step(batch))

    def collect(self) -> StepResult:
        return self._wait(Stepped, count=1, timeout_s=STEP_TIMEOUT_S)[0].result

    def close(self) -> None:
        if not self._end.alive:
            return
        if self._lost is None:
            self._lost = "the engine is closed"
            if self._writer.send(_encode(Stop()), is_lost=lambda: True):
                self._wait_for_ends(STOP_TIMEOUT_S)
        self._end()
        self._printer.join(1.0)
        self._replies.close()
        self._writer.close()
        for channel in self._sockets:
            channel.close()

    def _send(self, command: Command) -> None:
        if self._lost is not None:
            raise RanksLostError(self._lost)
        self._lost = "a message to the ranks was cut short"  # if an interrupt comes, some have got it
        if not self._writer.send(_encode(command), is_lost=self._has_ended):
            self._lost = None
            raise self._loss({})
        self._lost = None

    def _wait(self, kind: type[R], *, count: int, timeout_s: float | None = None) -> list[R]:
        """The next replies of a kind, by rank. Raises what made ranks fail, or RanksLostError."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            found = [(rank, reply) for rank, reply in self._inbox if isinstance(reply, kind)][:count]
            if len(found) == count:
                self._inbox = [item for item in self._inbox if item not in found]
                return [reply for _, reply in sorted(found, key=lambda item: item[0])]
            if self._lost is not None:
                raise RanksLostError(self._lost)
            if deadline is not None and time.monotonic() > deadline:
                raise self._loss({}, f"no rank has finished the step in {timeout_s:.0f} s: one of them hangs")
            if troubles := self._receive(POLL_S):
                raise self._loss(troubles)

    def _receive(self, timeout_s: float) -> dict[int, Failed | None]:
        """Take in what has arrived. Returns: the ranks in trouble: what they said, None for those that have ended."""
        troubles: dict[int, Failed | None] = {}
        for rank, message in self._replies.poll(timeout_s):
            reply = None if message is None else _DECODER.decode(message)
            if reply is None or isinstance(reply, Failed):
                troubles.setdefault(rank, reply)
            else:
                self._inbox.append((rank, reply))
        return troubles

    def _loss(self, troubles: dict[int, Failed | None], reason: str | None = None) -> ShardwrightError:
        """The error to raise for ranks in trouble, all of which are ended."""
        deadline = time.monotonic() + LAST_WORDS_S
        while reason is None and (left := deadline - time.monotonic()) > 0 and len(troubles) < len(self._processes):
            for rank, trouble in self._receive(left).items():
                troubles.setdefault(rank, trouble)
        said = {rank: failed for rank, failed in troubles.items() if failed is not None}
        killed = [rank for rank in troubles if rank not in said]
        bad_input = next((f for f in said.values() if issubclass(error_class(f.kind), UsageError)), None)
        if bad_input is not None and not self._is_serving:
            error: ShardwrightError = error_class(bad_input.kind)(bad_input.message)
        else:
            if reason is None and killed:
                reason = "; ".join(self._obituary(rank) for rank in killed)
            if reason is None:
                rank, failed = next(iter(said.items()), (0, Failed("", "its channel broke")))
                reason = f"rank {rank} failed: {failed.message}"
            error = RanksLostError(reason)
        self._lost = str(error)
        self.close()
        return error

    def _obituary(self, rank: int) -> str:
        try:
            code = self._processes[rank].wait(1.0)
        except subprocess.TimeoutExpired:
            return f"rank {rank} closed its channel"
        if code >= 0:
            return f"rank {rank} ended with exit code {code}"
        hint = " (was memory short?)" if -code == signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{hint}"

    def _has_ended(self) -> bool:
        return any(process.poll() is not None for process in self._processes)

    def _wait_for_ends(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return


def placements_of(config: EngineConfig) -> list[Placement]:
    """Where the ranks of an engine stand, all of them on this machine."""
    parallel = config.parallel
    num_ranks, tp, pp = parallel.num_ranks, parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    return [Placement(rank=rank, tp=tp, pp=pp, gpu=rank, num_local=num_ranks) for rank in range(num_ranks)]


def start_process(rank: int, num_ranks: int, descriptors: tuple[int, int, int]) -> subprocess.Popen[bytes]:
    """Start the interpreter of a rank, which finds the same modules as this one.

    Args:
        rank: its number.
        num_ranks: of all.
        descriptors: of the ring, its socket, and the pipe of life, which it inherits.
    """
    arguments = [str(number) for number in (rank, num_ranks, *descriptors)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}  # bars would mix
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "shardwright.parallel.rank", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        env=environment,
    )


def print_lines(streams: Sequence[IO[bytes]]) -> threading.Thread:
    """Print what ranks print to stderr, line by line, the number of the rank in front, until the last has ended.

    Returns: the thread that does it.
    """

    def pump(rank: int, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                print(f"[rank {rank}] {line.decode(errors='replace')}", end="", file=sys.stderr, flush=True)

    def pump_all() -> None:
        threads = [threading.Thread(target=pump, args=item, daemon=True) for item in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    thread = threading.Thread(target=pump_all, daemon=True)
    thread.start()
    return thread


def error_class(kind: str) -> type[ShardwrightError]:
    """The class of shardwright.errors with a name; RanksLostError if there is none."""
    found = getattr(errors, kind, None)
    return found if isinstance(found, type) and issubclass(found, ShardwrightError) else RanksLostError


def _end(processes: list[subprocess.Popen[bytes]], life: int) -> None:
    """Kill what is left. Also run when the program ends without having closed its engine."""
    os.close(life)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()

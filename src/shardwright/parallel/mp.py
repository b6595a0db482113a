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
from typing import IO

import msgspec

from shardwright.config import EngineConfig
from shardwright.parallel.channel import Replies, RingWriter, make_memory
from shardwright.parallel.messages import Command, Failed, Reply, Stop
from shardwright.parallel.ranks import STEP_TIMEOUT_S, Ranks, Troubles
from shardwright.parallel.setup import make_setup
from shardwright.worker.placement import Placement

HOST = "127.0.0.1"

STOP_TIMEOUT_S = 2.0
"""How long ranks may take to end before they are killed."""

_encode = msgspec.msgpack.Encoder().encode
_DECODER: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class MpRanks(Ranks):
    """Ranks of this machine.

    Args:
        config: of the engine.
        step_timeout_s: a rank that has not finished a step by then hangs.

    Raises: RanksLostError if they do not start.
    """

    def __init__(self, config: EngineConfig, *, step_timeout_s: float = STEP_TIMEOUT_S) -> None:
        placements = placements_of(config)
        super().__init__(len(placements), step_timeout_s=step_timeout_s)
        setup = make_setup(config, placements, host=HOST)
        ring = make_memory(self._num_ranks)
        life_read, life_write = os.pipe()
        pairs = [socket.socketpair() for _ in placements]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets = [ours for ours, _ in pairs]
        self._writer = RingWriter(ring, self._sockets)
        self._replies = Replies(self._sockets)
        self._end = weakref.finalize(self, end_processes, self._processes, life_write)
        try:
            for rank, (_, theirs) in enumerate(pairs):
                descriptors = (ring, theirs.fileno(), life_read)
                self._processes.append(start_process(rank, self._num_ranks, descriptors))
        finally:
            for descriptor in (ring, life_read):
                os.close(descriptor)
            for _, theirs in pairs:
                theirs.close()
        self._printer = print_lines([process.stdout for process in self._processes if process.stdout is not None])
        try:
            self.set_up(setup)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all ranks, gently first unless they are in trouble. May be called twice."""
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

    @property
    def process_ids(self) -> list[int]:
        """Of the ranks."""
        return [process.pid for process in self._processes]

    def _deliver(self, command: Command) -> bool:
        return self._writer.send(_encode(command), is_lost=self._has_ended)

    def _receive(self, timeout_s: float) -> Troubles:
        troubles: Troubles = {}
        for rank, message in self._replies.poll(timeout_s):
            reply = None if message is None else _DECODER.decode(message)
            if reply is None or isinstance(reply, Failed):
                troubles.setdefault(rank, reply)
            else:
                self._inbox.append((rank, reply))
        return troubles

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
    num_local = num_ranks * parallel.data_parallel_size
    return [Placement(rank=rank, tp=tp, pp=pp, gpu=rank, num_local=num_local) for rank in range(num_ranks)]


def start_process(rank: int, num_ranks: int, descriptors: tuple[int, int, int]) -> subprocess.Popen[bytes]:
    """Start the interpreter of a rank, which finds the same modules as this one.

    Args:
        rank: its number.
        num_ranks: of all.
        descriptors: of the ring, its socket, and the pipe of life, which it inherits.
    """
    arguments = [str(number) for number in (rank, num_ranks, *descriptors)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "shardwright.parallel.rank", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
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


def end_processes(processes: list[subprocess.Popen[bytes]], life: int) -> None:
    """Kill what is left. Also run when the program ends without having closed its engine."""
    os.close(life)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()

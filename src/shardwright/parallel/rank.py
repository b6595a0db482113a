"""One rank: the same code in a process of this machine and in a Ray actor.

Run as a program, with the descriptors of its channels, it is a process of the `mp` executor.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING

import msgspec

from shardwright.config import EngineConfig
from shardwright.errors import ShardwrightError
from shardwright.models.registry import adopt
from shardwright.parallel.channel import RingReader, send_reply
from shardwright.parallel.messages import (
    Allocate,
    Allocated,
    Command,
    Failed,
    Load,
    Loaded,
    Opened,
    Reply,
    Setup,
    Step,
    Stepped,
    Stop,
)
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.placement import Placement
from shardwright.worker.report import Allocation, WorkerReport

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # it is there, but not declared

    from shardwright.parallel.groups import ProcessGroups
    from shardwright.worker.worker import Worker

logger = logging.getLogger(__name__)


class Rank:
    """A worker and its place among others. Methods are called in the order in which they stand here.

    Args:
        placement: of the rank.
        host: address at which the ranks meet: one of rank 0's machine.
    """

    def __init__(self, placement: Placement, host: str) -> None:
        self._placement = placement
        self._host = host
        self._store: Store | None = None
        self._groups: ProcessGroups | None = None
        self._worker: Worker | None = None

    def open(self) -> int:
        """Let others meet this rank; rank 0 does. Returns: the port at its address."""
        from shardwright.parallel.groups import open_store

        self._store = open_store(self._host)
        return int(self._store.port)

    def load(self, config: EngineConfig, port: int) -> WorkerReport:
        """Load and measure; a model loaded before is dropped. Raises a UsageError for what does not work."""
        from shardwright.parallel.groups import ProcessGroups
        from shardwright.worker.worker import Worker, resolve_device

        if self._groups is None and self._placement.num_ranks > 1:
            self._groups = ProcessGroups(
                self._placement,
                host=self._host,
                port=port,
                store=self._store,
                device=resolve_device(config.model.device, self._placement),
            )
        self._worker = None
        self._worker = Worker(config, self._placement, self._groups)
        return self._worker.report

    def allocate(self, allocation: Allocation) -> None:
        """Make room for the cache."""
        assert self._worker is not None
        self._worker.allocate(allocation)

    def execute(self, batch: Batch) -> StepResult | None:
        """Run one step; None from ranks that do not sample."""
        assert self._worker is not None
        return self._worker.execute(batch)


def set_up_logging(setup: Setup, placement: Placement) -> None:
    """Records go to stderr. Rank 0 tells the story, one rank of each stage warns, the others only fail."""
    level = max(setup.log_level, logging.WARNING if placement.tp_rank == 0 else logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("shardwright").setLevel(setup.log_level if placement.rank == 0 else level)


def adopt_registration(setup: Setup) -> None:
    """Take over the model that the program has registered."""
    if setup.registration is None:
        return
    from multiprocessing import spawn

    spawn.prepare(setup.main)  # imports the program's main module, as processes of multiprocessing do
    adopt(pickle.loads(setup.registration))


def failure(exc: BaseException) -> Failed:
    """An exception as a reply."""
    if isinstance(exc, ShardwrightError):
        return Failed(type(exc).__name__, str(exc))
    where = traceback.extract_tb(exc.__traceback__)[-1]
    text = " ".join(f"{type(exc).__name__}: {exc}".split())
    return Failed(type(exc).__name__, f"{text} ({os.path.basename(where.filename)}:{where.lineno})")


class _Process:
    """A rank that is told what to do through a ring and replies through a socket."""

    def __init__(self, index: int, num_ranks: int, ring: int, channel: int) -> None:
        self._index = index
        self._socket = socket.socket(fileno=channel)
        self._reader = RingReader(ring, num_ranks, index, self._socket)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._rank: Rank | None = None

    def run(self) -> int:
        """Carry out commands until there are no more. Returns: the exit code."""
        try:
            while not isinstance(command := self._decoder.decode(self._reader.receive()), Stop):
                if (reply := self._carry_out(command)) is not None:
                    self._send(reply)
        except EOFError:  # the executor is gone
            return 1
        except BaseException as exc:
            logger.debug("rank %d failed", self._index, exc_info=True)
            self._send(failure(exc))
            return 1
        return 0

    def _carry_out(self, command: Command) -> Reply | None:
        if isinstance(command, Setup):
            return self._set_up(command)
        assert self._rank is not None
        if isinstance(command, Step):
            result = self._rank.execute(command.batch)
            return None if result is None else Stepped(result)
        if isinstance(command, Load):
            return Loaded(self._rank.load(command.config, command.port))
        assert isinstance(command, Allocate)
        self._rank.allocate(command.allocation)
        return Allocated()

    def _set_up(self, setup: Setup) -> Reply | None:
        num_ranks = setup.tp * setup.pp
        placement = Placement(rank=self._index, tp=setup.tp, pp=setup.pp, local_rank=self._index, num_local=num_ranks)
        set_up_logging(setup, placement)
        adopt_registration(setup)
        self._rank = Rank(placement, setup.host)
        return Opened(self._rank.open()) if self._index == 0 else None

    def _send(self, reply: Reply) -> None:
        send_reply(self._socket, self._encoder.encode(reply))


def _end_with(descriptor: int) -> None:
    """End this process when the other end of a pipe is closed: the executor's process is gone, however it went."""
    os.read(descriptor, 1)
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Entry point of the process.

    Args:
        arguments: number of the rank, of all ranks, and descriptors of the ring, the socket and the pipe of life.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the executor decides
        signal.signal(number, signal.SIG_IGN)
    index, num_ranks, ring, channel, life = map(int, arguments)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    code = _Process(index, num_ranks, ring, channel).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through the destructors of process groups, which wait for others


if __name__ == "__main__":
    main(sys.argv[1:])

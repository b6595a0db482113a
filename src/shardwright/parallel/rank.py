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
from shardwright.foreign_models import remember_model_names
from shardwright.garbage import start_of_process
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
from shardwright.worker.placement import Placement
from shardwright.worker.report import WorkerReport

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # it is there, but not declared

    from shardwright.parallel.groups import ProcessGroups
    from shardwright.worker.worker import Worker

logger = logging.getLogger(__name__)


class Rank:
    """A worker and its place among others: carries out what an executor says.

    Args:
        index: number of the rank.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._placement = Placement()
        self._host = ""
        self._store: Store | None = None
        self._groups: ProcessGroups | None = None
        self._worker: Worker | None = None

    def carry_out(self, command: Command) -> Reply | None:
        """Do what is said. Returns: what is to be replied. Raises whatever goes wrong; the rank cannot go on then."""
        if isinstance(command, Setup):
            return self._set_up(command)
        if isinstance(command, Load):
            remember_model_names()
            with start_of_process():
                return Loaded(self._load(command.config, command.port))
        assert self._worker is not None, "a model is loaded first"
        if isinstance(command, Step):
            result = self._worker.execute(command.batch)
            return None if result is None else Stepped(result)
        assert isinstance(command, Allocate)
        self._worker.allocate(command.allocation)
        return Allocated()

    def _set_up(self, setup: Setup) -> Reply | None:
        self._placement, self._host = setup.placements[self._index], setup.host
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._placement.num_local)))  # before torch comes
        set_up_logging(setup, self._placement)
        adopt_registration(setup)
        if self._index > 0:
            return None
        from shardwright.parallel.groups import open_store

        self._store = open_store(self._host)
        return Opened(int(self._store.port))

    def _load(self, config: EngineConfig, port: int) -> WorkerReport:
        from transformers.utils.logging import disable_progress_bar

        from shardwright.parallel.groups import ProcessGroups
        from shardwright.worker.worker import Worker, resolve_device

        disable_progress_bar()  # those of several ranks would run into each other
        if self._groups is None and self._placement.num_ranks > 1:
            self._groups = ProcessGroups(
                self._placement,
                host=self._host,
                port=port,
                store=self._store,
                device=resolve_device(config.model.device, self._placement),
            )
        self._worker = None  # the one before goes first
        self._worker = Worker(config, self._placement, self._groups)
        return self._worker.report


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


def serve(index: int, num_ranks: int, ring: int, channel: int) -> int:
    """Carry out what comes through a ring and reply through a socket, until there is no more.

    Args:
        index: number of the rank.
        num_ranks: of all.
        ring, channel: descriptors of both.

    Returns: the exit code.
    """
    replies = socket.socket(fileno=channel)
    reader = RingReader(ring, num_ranks, index, replies)
    rank = Rank(index)
    decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
    encode = msgspec.msgpack.Encoder().encode
    try:
        while not isinstance(command := decoder.decode(reader.receive()), Stop):
            if (reply := rank.carry_out(command)) is not None:
                send_reply(replies, encode(reply))
    except EOFError:  # the executor is gone
        return 1
    except BaseException as exc:
        logger.debug("rank %d failed", index, exc_info=True)
        send_reply(replies, encode(failure(exc)))
        return 1
    return 0


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
    code = serve(index, num_ranks, ring, channel)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through the destructors of process groups, which wait for others


if __name__ == "__main__":
    main(sys.argv[1:])

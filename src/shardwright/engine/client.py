"""The engine core in a process of its own, seen from the front end: zmq sockets, msgspec messages, and a watch on its
life.

    front end                                          core process (engine/process.py)
      PUSH  ── Add, Abort, ResetPrefixCache, Shutdown ──►  PULL
      PULL  ◄────────────── Ready, Outputs, Failed ──────  PUSH

The sockets are unix-domain ones in a directory that only this user can enter.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import tempfile
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from shardwright import errors
from shardwright.config import EngineConfig
from shardwright.engine.messages import Command, EngineInfo, Event, Failed, Ready, Shutdown
from shardwright.engine.process import run_core_process
from shardwright.engine.share import changed_environment
from shardwright.errors import EngineDeadError, ShardwrightError
from shardwright.models.registry import portable

START_POLL_MS = 200
"""How often the core process is looked after while it starts."""

STOP_TIMEOUT_S = 10.0
"""How long the core process may take to end before it is killed."""


class CoreClient:
    """Starts the core process and talks to it. `wait_until_ready` comes before all else.

    Args:
        config: of the engine.
        environment: variables for the process, beside those of this one.
    """

    def __init__(self, config: EngineConfig, environment: dict[str, str] | None = None) -> None:
        registration = portable(config.model.model)
        self._directory = Path(tempfile.mkdtemp(prefix="shardwright-"))
        self._context = zmq.Context()
        self._commands = self._bind(zmq.PUSH, "commands")
        self._events = self._bind(zmq.PULL, "events")
        self._async_events = zmq.asyncio.Socket.from_socket(self._events)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._is_closed = False
        log_level = logging.getLogger("shardwright").getEffectiveLevel()
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_core_process,
            args=(config, self._address("commands"), self._address("events"), log_level, registration),
            name="shardwright-core",
            daemon=True,
        )
        with changed_environment(environment or {}):
            self._process.start()
        self._end = Finalize(self, _end, args=(self._process, self._directory), exitpriority=1)

    @property
    def is_alive(self) -> bool:
        return not self._is_closed and self._process.is_alive()

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends."""
        return self._process.sentinel

    @property
    def events(self) -> zmq.Socket[bytes]:
        """For a zmq.Poller: readable when `receive_now` has something."""
        return self._events

    def wait_until_ready(self) -> EngineInfo:
        """Block until the core has loaded its model.

        Raises: what the core raised, if it is one of our errors; EngineDeadError if its process died.
        """
        while not self._events.poll(START_POLL_MS):
            if not self._process.is_alive() and not self._events.poll(0):
                raise EngineDeadError(self.obituary())
        event = self.receive_now()
        if isinstance(event, Failed):
            raise as_error(event)
        assert isinstance(event, Ready)
        return event.info

    def send(self, command: Command) -> bool:
        """Queue a command; the core takes it before its next step. Raises EngineDeadError after `close`.

        Returns: whether there is a core to take it; there is none once its process has ended (see `sentinel`).
        """
        if self._is_closed:
            raise EngineDeadError("the engine is closed")
        try:
            self._commands.send(self._encoder.encode(command), zmq.DONTWAIT)  # would wait for another to connect
        except zmq.Again:
            return False
        return True

    async def receive(self) -> Event:
        """The next event. Waits for ever if the process died (see `sentinel`)."""
        return self._decoder.decode(await self._async_events.recv())

    def receive_now(self) -> Event:
        """The next event, which must have come (see `events`)."""
        return self._decoder.decode(self._events.recv())

    def obituary(self) -> str:
        """Why the process is gone."""
        self._process.join(1)
        code = self._process.exitcode
        reason = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "; was memory short? try a smaller --kv-cache-memory-bytes" if code == -9 else ""
        return f"the engine core process ended ({reason}){hint}"

    def close(self, *, gently: bool = True) -> None:
        """End the core process. May be called twice.

        Args:
            gently: let it end by itself first, if it does so soon.
        """
        if self._is_closed:
            return
        if gently and self._process.is_alive() and self.send(Shutdown()):
            self._process.join(STOP_TIMEOUT_S)
        self._is_closed = True
        self._end()
        self._async_events.close(linger=0)
        self._context.destroy(linger=0)

    def _address(self, name: str) -> str:
        return f"ipc://{self._directory / name}"

    def _bind(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.bind(self._address(name))
        return socket


def _end(process: BaseProcess, directory: Path) -> None:
    """Kill what is left. Also run when the program ends, or forgets the client, without having closed it."""
    if process.is_alive():
        process.kill()
        process.join()
    shutil.rmtree(directory, ignore_errors=True)


def as_error(event: Failed) -> ShardwrightError:
    """What made a core fail."""
    kind = getattr(errors, event.kind, EngineDeadError)
    error = kind(event.message)
    assert isinstance(error, ShardwrightError)
    return error

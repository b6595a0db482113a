"""The engine core as a process: takes commands between steps, sends what each step brought, ends with its parent."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import signal
import sys
import traceback
from pathlib import Path

import msgspec
import zmq

from shardwright.config import EngineConfig
from shardwright.engine.core import EngineCore
from shardwright.engine.messages import (
    Abort,
    Add,
    Command,
    Event,
    Failed,
    Outputs,
    Pool,
    Ready,
    ResetPrefixCache,
    Shutdown,
)
from shardwright.engine.pooling_core import PoolingCore
from shardwright.engine.start import Core, early_start, own_process, start_core
from shardwright.errors import ShardwrightError
from shardwright.garbage import start_of_process
from shardwright.models.registry import Registration, adopt

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 500
"""How long an idle core waits for a command before it looks whether its parent still lives."""


def run_core_process(
    config: EngineConfig,
    command_address: str,
    event_address: str,
    log_level: int,
    registration: Registration | None = None,
) -> None:
    """Entry point of the process. Failures travel to the parent as `Failed`; the exit code is then 1.

    Args:
        config: of the engine.
        command_address, event_address: zmq endpoints that the parent has bound.
        log_level: of the parent's logger; records go to stderr.
        registration: of the model, if the parent has registered it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("shardwright").setLevel(log_level)
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.set_hwm(0)
    events.set_hwm(0)
    commands.connect(command_address)
    events.connect(event_address)
    channel = _Channel(commands, events)
    core: Core | None = None
    try:
        adopt(registration)
        with start_of_process():
            own_process(config)
            with early_start(config):
                core = start_core(config)
        channel.send(Ready(core.info))
        _serve(core, channel)
    except BaseException as exc:
        known = isinstance(exc, ShardwrightError)
        logger.debug("the engine core failed", exc_info=True)
        message = str(exc) if known else f"{type(exc).__name__}: {exc}\n{traceback.format_exc()}"
        channel.send(Failed(type(exc).__name__ if known else "EngineDeadError", message))
        sys.exit(1)
    finally:
        if core is not None:
            core.close()
        context.destroy(linger=2000)
        if _is_orphan():  # nobody else is left to remove the sockets
            shutil.rmtree(Path(command_address.removeprefix("ipc://")).parent, ignore_errors=True)


def _is_orphan() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


class _Channel:
    """Commands in, events out."""

    def __init__(self, commands: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        self._commands = commands
        self._events = events
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)

    def send(self, event: Event) -> None:
        self._events.send(self._encoder.encode(event))

    def receive(self, *, timeout_ms: int) -> Command | None:
        """The next command; None if none comes in time."""
        if not self._commands.poll(timeout_ms):
            return None
        return self._decoder.decode(self._commands.recv())


def _serve(core: Core, channel: _Channel) -> None:
    while True:
        while (command := channel.receive(timeout_ms=0 if core.has_work else IDLE_POLL_MS)) is not None:
            if isinstance(command, Shutdown):
                return
            _carry_out(core, channel, command)
        if _is_orphan():
            return
        if core.has_work:
            channel.send(Outputs(core.step()))


def _carry_out(core: Core, channel: _Channel, command: Command) -> None:
    if isinstance(command, Add):
        assert isinstance(core, EngineCore)
        core.add(command.request)
    elif isinstance(command, Pool):
        assert isinstance(core, PoolingCore)
        for request in command.requests:
            core.add(request)
    elif isinstance(command, Abort):
        for request_id in command.request_ids:
            core.abort(request_id)
        channel.send(Outputs(core.nothing_new()))  # so that the front end sees the freed blocks
    elif isinstance(command, ResetPrefixCache):
        core.reset_prefix_cache()

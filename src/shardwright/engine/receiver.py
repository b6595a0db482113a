"""Listens to all cores from one event loop: a task for each, and a watch on its life."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from shardwright.engine.client import CoreClient, as_error
from shardwright.engine.messages import EngineOutputs, Failed
from shardwright.engine.replicas import Replicas
from shardwright.errors import EngineDeadError, ShardwrightError


class Receiver:
    """Hands on what cores send, for as long as one of them is left.

    Args:
        cores: ready.
        take: gets what a step brought.
        fail: is told, once, that nothing more will come, and why.
    """

    def __init__(
        self, cores: Replicas, *, take: Callable[[EngineOutputs], None], fail: Callable[[ShardwrightError], None]
    ) -> None:
        self._cores = cores
        self._take = take
        self._fail = fail
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sentinels: dict[int, int] = {}

    def start(self) -> None:
        """Listen in the running event loop, unless that has begun already."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for index, client in self._cores.clients.items():
                self._watch(self._loop, index, client)

    def close(self) -> None:
        """Listen no more."""
        if self._loop is not None and not self._loop.is_closed():
            for index in list(self._tasks):
                self._unwatch(self._loop, index)

    def _watch(self, loop: asyncio.AbstractEventLoop, index: int, client: CoreClient) -> None:
        self._tasks[index] = loop.create_task(self._receive(loop, index, client), name=f"shardwright-receiver-{index}")
        self._sentinels[index] = client.sentinel
        loop.add_reader(client.sentinel, self._died, loop, index, client)

    def _unwatch(self, loop: asyncio.AbstractEventLoop, index: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.remove_reader(self._sentinels.pop(index))
        self._tasks.pop(index).cancel()

    async def _receive(self, loop: asyncio.AbstractEventLoop, index: int, client: CoreClient) -> None:
        error: ShardwrightError | None = None
        while error is None:
            event = await client.receive()
            if isinstance(event, Failed):
                error = as_error(event)
                continue
            try:
                outputs = self._cores.take(index, event)
            except ShardwrightError as exc:
                error = exc
            else:
                if outputs is not None:
                    self._take(outputs)
        self._lose(loop, index, error)

    def _died(self, loop: asyncio.AbstractEventLoop, index: int, client: CoreClient) -> None:
        self._lose(loop, index, EngineDeadError(client.obituary()))

    def _lose(self, loop: asyncio.AbstractEventLoop, index: int, error: ShardwrightError) -> None:
        self._unwatch(loop, index)
        try:
            is_started_anew = self._cores.lose(index, error)
        except ShardwrightError as exc:
            self._fail(exc)
            return
        if is_started_anew:
            self._watch(loop, index, self._cores.clients[index])

"""Replicas in the place of a core of this process: what LLM steps where it has several."""

from __future__ import annotations

from collections import deque

import zmq

from shardwright.config import EngineConfig
from shardwright.engine.client import as_error
from shardwright.engine.messages import (
    EngineInfo,
    EngineOutputs,
    EngineRequest,
    Event,
    Failed,
    PoolingRequest,
    SchedulerStats,
)
from shardwright.engine.replicas import Replicas
from shardwright.errors import EngineDeadError, ShardwrightError


class RemoteCore:
    """Several cores, each in a process of its own, that are stepped like one.

    Args:
        config: of the engine.

    Raises: what the cores raise at start.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._cores = Replicas(config)
        self._received: deque[EngineOutputs] = deque()
        try:
            self.info: EngineInfo = self._cores.wait_until_ready()
        except BaseException:
            self._cores.close()
            raise

    @property
    def has_work(self) -> bool:
        return self._cores.num_unfinished > 0 or bool(self._received)

    @property
    def stats(self) -> SchedulerStats:
        """Sums over the replicas, as far as they have told."""
        self._receive(timeout_ms=0)
        return self._cores.stats

    def add(self, request: EngineRequest | PoolingRequest) -> None:
        if isinstance(request, EngineRequest):
            self._cores.add(request)
        else:
            self._cores.pool([request])

    def abort(self, request_id: str) -> None:
        self._cores.abort([request_id])

    def reset_prefix_cache(self) -> None:
        self._cores.reset_prefix_cache()

    def step(self) -> EngineOutputs:
        """Wait for what the next step of a core brings. Raises EngineDeadError if no core is left."""
        while not self._received:
            self._receive(timeout_ms=None)
        return self._received.popleft()

    def close(self) -> None:
        """End the cores."""
        self._cores.close()

    def _receive(self, *, timeout_ms: int | None) -> None:
        """Take in what all cores have sent, waiting until one has or has died."""
        poller = zmq.Poller()
        clients = self._cores.clients
        for client in clients.values():
            poller.register(client.events, zmq.POLLIN)
            poller.register(client.sentinel, zmq.POLLIN)
        readable = dict(poller.poll(timeout_ms))
        for index, client in clients.items():
            try:
                while client.events.poll(0):
                    self._take(index, client.receive_now())
                if client.sentinel in readable:
                    raise EngineDeadError(client.obituary())
            except ShardwrightError as error:
                self._cores.lose(index, error)

    def _take(self, index: int, event: Event) -> None:
        if isinstance(event, Failed):
            raise as_error(event)
        outputs = self._cores.take(index, event)
        if outputs is not None:
            self._received.append(outputs)

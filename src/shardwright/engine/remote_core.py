"""Replicas in the place of a core of this process: what LLM steps where it has several."""

from __future__ import annotations

import zmq

from shardwright.config import EngineConfig
from shardwright.engine.client import CoreClient, as_error
from shardwright.engine.messages import (
    EngineInfo,
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    Failed,
    PoolingOutput,
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
        try:
            self.info: EngineInfo = self._cores.wait_until_ready()
        except BaseException:
            self._cores.close()
            raise

    @property
    def has_work(self) -> bool:
        return self._cores.num_unfinished > 0

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
        """Wait for what steps of the cores bring. Raises EngineDeadError if no core is left."""
        outputs, pooled = self._receive(timeout_ms=None)
        return EngineOutputs(outputs=outputs, stats=self._cores.stats, pooled=pooled)

    def close(self) -> None:
        """End the cores."""
        self._cores.close()

    def _receive(self, *, timeout_ms: int | None) -> tuple[list[EngineOutput], list[PoolingOutput]]:
        """What all cores have sent, waiting until one has or has died."""
        poller = zmq.Poller()
        clients = self._cores.clients
        for client in clients.values():
            poller.register(client.events, zmq.POLLIN)
            poller.register(client.sentinel, zmq.POLLIN)
        readable = dict(poller.poll(timeout_ms))
        outputs: list[EngineOutput] = []
        pooled: list[PoolingOutput] = []
        for index, client in clients.items():
            try:
                while client.events.poll(0):
                    self._take(index, client, outputs, pooled)
                if client.sentinel in readable:
                    raise EngineDeadError(client.obituary())
            except ShardwrightError as error:
                self._cores.lose(index, error)
        return outputs, pooled

    def _take(self, index: int, client: CoreClient, outputs: list[EngineOutput], pooled: list[PoolingOutput]) -> None:
        event = client.receive_now()
        if isinstance(event, Failed):
            raise as_error(event)
        new = self._cores.take(index, event)
        if new is not None:
            outputs += new.outputs
            pooled += new.pooled

"""The engine's cores as one: each has a whole copy of the model, in a process of its own (data parallelism).

Requests go where the router says. When a core is lost, others go on with its sequences where they were, and it is
started anew in the background; when the last is lost, so is the engine. With a single core nothing is noted, and
nothing costs more than talking to it.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import msgspec

from shardwright.cache.prefix import extend_keys
from shardwright.config import EngineConfig
from shardwright.engine.client import CoreClient
from shardwright.engine.messages import (
    Abort,
    Add,
    EngineInfo,
    EngineOutputs,
    EngineRequest,
    Event,
    Outputs,
    Pool,
    PoolingRequest,
    Ready,
    ResetPrefixCache,
    SchedulerStats,
    Shutdown,
)
from shardwright.engine.replica import Assignment, Replica
from shardwright.engine.router import Router
from shardwright.engine.share import config_of_replica, environment_of_replica
from shardwright.errors import EngineDeadError, ShardwrightError

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Losses of a replica with no token in between, after which it is not started any more."""


class Replicas:
    """Starts the cores and divides the work. `wait_until_ready` comes before all else.

    Whoever owns it hands in what cores send (`take`), and tells when one is gone (`lose`).

    Args:
        config: of the engine.

    Raises: ConfigError if the machine has too little for all.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._replicas: list[Replica] = []
        self._assignments: dict[str, Assignment] = {}
        self._router: Router | None = None
        try:
            for index in range(config.parallel.data_parallel_size):
                self._replicas.append(Replica(self._start(index)))
        except BaseException:
            self.close()
            raise

    def wait_until_ready(self) -> EngineInfo:
        """Block until all cores have loaded the model.

        Raises: what a core raised, if it is one of our errors; EngineDeadError if its process died.
        """
        infos = [replica.client.wait_until_ready() for replica in self._replicas]
        for replica in self._replicas:
            replica.is_ready = True
        self.info = msgspec.structs.replace(infos[0], max_model_len=min(info.max_model_len for info in infos))
        if len(infos) > 1:
            finds = self._config.cache.enable_prefix_caching and self.info.reuses_prefixes
            self._router = Router(
                len(infos),
                block_size=self.info.block_size,
                num_blocks=max(info.num_blocks for info in infos) if finds else 0,
            )
        return self.info

    @property
    def clients(self) -> dict[int, CoreClient]:
        """The cores that run or start, by number."""
        return {index: replica.client for index, replica in enumerate(self._replicas) if not replica.is_given_up}

    @property
    def is_alive(self) -> bool:
        """Whether there is a core that takes requests."""
        return any(replica.is_ready and replica.client.is_alive for replica in self._replicas)

    @property
    def states(self) -> list[tuple[SchedulerStats, bool]]:
        """Per replica, its scheduler's state, and whether it takes requests."""
        return [(replica.stats, replica.is_ready and replica.client.is_alive) for replica in self._replicas]

    @property
    def stats(self) -> SchedulerStats:
        """Sums over the replicas."""
        if len(self._replicas) == 1:
            return self._replicas[0].latest
        return SchedulerStats.total(replica.stats for replica in self._replicas)

    @property
    def num_unfinished(self) -> int:
        """Sequences and texts that have not ended, where there are several replicas."""
        return len(self._assignments)

    def add(self, request: EngineRequest) -> None:
        """Queue a sequence with one of the cores. Raises EngineDeadError after `close`."""
        self._replicas[self._assign(request)].client.send(Add(request))

    def pool(self, requests: list[PoolingRequest]) -> None:
        """Queue texts to be read whole. Raises EngineDeadError after `close`."""
        parts: dict[int, list[PoolingRequest]] = defaultdict(list)
        for request in requests:
            parts[self._assign(request)].append(request)
        for index, part in parts.items():
            self._replicas[index].client.send(Pool(part))

    def abort(self, request_ids: list[str]) -> None:
        """End sequences or texts, wherever they are. Raises EngineDeadError after `close`."""
        if self._router is None:
            self._replicas[0].client.send(Abort(request_ids))
            return
        parts: dict[int, list[str]] = defaultdict(list)
        for request_id in request_ids:
            if (assignment := self._finish(request_id)) is not None:
                parts[assignment.replica].append(request_id)
        for index, part in parts.items():
            self._replicas[index].client.send(Abort(part))

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, everywhere. Raises EngineDeadError after `close`."""
        for index, client in self.clients.items():
            client.send(ResetPrefixCache())
            if self._router is not None:
                self._router.forget(index)

    def take(self, index: int, event: Event) -> EngineOutputs | None:
        """Note what a core has sent. Returns: what a step of it has brought, if that is what it sent.

        Raises: EngineDeadError if a core that was started anew cannot do what the others do: it is to be lost.
        """
        replica = self._replicas[index]
        if isinstance(event, Ready):
            if event.info.max_model_len < self.info.max_model_len:
                raise EngineDeadError(f"it has memory for {event.info.max_model_len:,} tokens per request only")
            replica.is_ready = True
            logger.info("replica %d is ready again", index)
            return None
        assert isinstance(event, Outputs)
        outputs = event.outputs
        if self._router is not None:
            self._note(index, replica, outputs, self._router)
        replica.latest = outputs.stats
        return outputs

    def lose(self, index: int, error: ShardwrightError) -> bool:
        """A core is gone: let others go on with what it had, and start another in its place.

        Returns: whether another was started.
        Raises: the error, if no core is left that takes requests.
        """
        replica = self._replicas[index]
        replica.bury()
        if self._router is None or not self.is_alive:
            raise error
        replica.client.close(gently=False)
        self._router.forget(index)
        moving = [one for one in self._assignments.values() if one.replica == index]
        replica.is_given_up = replica.num_losses >= MAX_LOSSES
        logger.warning(
            "replica %d was lost: %s; %d requests go on elsewhere, and it is %s",
            index,
            error,
            len(moving),
            "given up: it was lost too often with no token in between" if replica.is_given_up else "started anew",
        )
        for assignment in moving:
            request = assignment.continuation()
            if isinstance(request, EngineRequest):
                self.add(request)
            else:
                self.pool([request])
        if not replica.is_given_up:
            replica.client = self._start(index)
        return not replica.is_given_up

    def close(self) -> None:
        """End all cores. May be called twice."""
        for replica in self._replicas:
            if replica.client.is_alive:
                replica.client.send(Shutdown())  # to all before any is waited for
        for replica in self._replicas:
            replica.client.close()

    def _start(self, index: int) -> CoreClient:
        return CoreClient(config_of_replica(self._config, index), environment_of_replica(self._config, index))

    def _assign(self, request: EngineRequest | PoolingRequest) -> int:
        """The replica for a request."""
        if self._router is None:
            return 0
        keys: list[bytes] = []
        assignment = Assignment(request, 0, keys)
        if isinstance(request, EngineRequest):
            extend_keys(keys, assignment.token_ids, self.info.block_size)
        loads = {index: replica.load for index, replica in enumerate(self._replicas) if replica.is_ready}
        assignment.replica = self._router.choose(keys, loads)
        self._router.note(assignment.replica, keys)
        self._assignments[request.request_id] = assignment
        self._replicas[assignment.replica].load += len(assignment.token_ids)
        return assignment.replica

    def _note(self, index: int, replica: Replica, outputs: EngineOutputs, router: Router) -> None:
        if outputs.stats.num_restarts > replica.latest.num_restarts:  # its ranks were lost, and what they had cached
            router.forget(index)
        for output in outputs.outputs:
            assignment = self._assignments.get(output.request_id)
            if assignment is None or assignment.replica != index:
                continue
            replica.num_losses = 0
            replica.load += len(output.new_token_ids)
            assignment.take(output)
            if output.finish_reason is not None:
                self._finish(output.request_id)
                extend_keys(assignment.keys, assignment.token_ids, self.info.block_size)
                router.note(index, assignment.keys)
        for pooled in outputs.pooled:
            replica.num_losses = 0
            self._finish(pooled.request_id)

    def _finish(self, request_id: str) -> Assignment | None:
        assignment = self._assignments.pop(request_id, None)
        if assignment is not None:
            self._replicas[assignment.replica].load -= len(assignment.token_ids)
        return assignment

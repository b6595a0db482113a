"""Ranks as actors of a Ray cluster: one that runs, on any number of machines, or one that is started here for them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

import msgspec

from shardwright.config import EngineConfig
from shardwright.parallel.messages import Command, Failed, Reply
from shardwright.parallel.rank import Rank, failure
from shardwright.parallel.ranks import STEP_TIMEOUT_S, Ranks, Troubles
from shardwright.parallel.ray_cluster import RayCluster, Slot, import_ray
from shardwright.parallel.setup import make_setup
from shardwright.worker.placement import Placement

logger = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_DECODER: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class RankActor:
    """One rank in a process of Ray.

    Args:
        index: number of the rank.
        num_threads: that the user wants it to have; None: its share of the machine's cores.
    """

    def __init__(self, index: int, num_threads: str | None) -> None:
        os.dup2(2, 1)  # what ranks print is no result of the program's, whose output Ray would put it into
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray says 1
        if num_threads is not None:
            os.environ["OMP_NUM_THREADS"] = num_threads
        self._index = index
        self._rank = Rank(index)

    def __repr__(self) -> str:
        """What Ray puts in front of each line that is printed."""
        return f"rank {self._index}"

    def carry_out(self, command: bytes) -> bytes | None:
        """Do what is said, in msgpack, and reply; a failure is a reply too."""
        try:
            reply = self._rank.carry_out(_COMMANDS.decode(command))
        except BaseException as exc:
            logger.debug("rank %d failed", self._index, exc_info=True)
            reply = failure(exc)
        return None if reply is None else _encode(reply)


class RayRanks(Ranks):
    """Ranks in a Ray cluster.

    Args:
        config: of the engine.
        step_timeout_s: a rank that has not finished a step by then hangs.

    Raises: ConfigError if Ray is not installed, does not answer, or has no room; RanksLostError if ranks do not start.
    """

    def __init__(self, config: EngineConfig, *, step_timeout_s: float = STEP_TIMEOUT_S) -> None:
        super().__init__(config.parallel.num_ranks, step_timeout_s=step_timeout_s)
        self._ray = import_ray()
        self._cluster: RayCluster | None = RayCluster(config)
        self._slots = self._cluster.slots
        self._pending: dict[Any, int] = {}
        """Replies that are yet to come, and their ranks."""
        self._actors: list[Any] = []
        try:
            self._actors += [self._start_actor(self._cluster, rank) for rank in range(self._num_ranks)]
            placements = placements_in(config, self._slots, uses_gpus=self._cluster.uses_gpus)
            self.set_up(make_setup(config, placements, host=self._slots[0].address))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all ranks, and give their places back. May be called twice."""
        if self._cluster is None:
            return
        cluster, self._cluster = self._cluster, None
        self._lost = self._lost or "the engine is closed"
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        self._pending.clear()
        cluster.close()

    def _start_actor(self, cluster: RayCluster, rank: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=cluster.group, placement_group_bundle_index=cluster.slots[rank].bundle
        )
        options = {
            "num_cpus": 1,
            "num_gpus": int(cluster.uses_gpus),
            "max_restarts": 0,
            "scheduling_strategy": strategy,
        }
        return self._ray.remote(RankActor).options(**options).remote(rank, os.environ.get("OMP_NUM_THREADS"))

    def _deliver(self, command: Command) -> bool:
        message = _encode(command)
        for rank, actor in enumerate(self._actors):
            self._pending[actor.carry_out.remote(message)] = rank
        return True  # a rank that is gone shows when its reply is awaited

    def _receive(self, timeout_s: float) -> Troubles:
        troubles: Troubles = {}
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout_s) if self._pending else ([], [])
        for reference in ready:
            rank = self._pending.pop(reference)
            try:
                message = self._ray.get(reference)
            except self._ray.exceptions.RayError as exc:
                logger.debug("rank %d: %s", rank, exc)
                troubles[rank] = None
                continue
            reply = None if message is None else _DECODER.decode(message)
            if isinstance(reply, Failed):
                troubles[rank] = reply
            elif reply is not None:
                self._inbox.append((rank, reply))
        return troubles

    def _obituary(self, rank: int) -> str:
        return f"rank {rank} at {self._slots[rank].address} died"


def placements_in(config: EngineConfig, slots: list[Slot], *, uses_gpus: bool) -> list[Placement]:
    """Where the ranks of an engine stand in a cluster. Ray shows each of them the GPU that it may use, and no other.

    On CPUs the ranks of other replicas share the machine. Where Ray puts these is not known yet, so as many are counted
    as there is room for: a rank with too few threads is slower, those with too many together stand in each other's way.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    num_others = parallel.num_ranks * (parallel.data_parallel_size - 1)
    here = Counter(slot.address for slot in slots)

    def num_local(slot: Slot) -> int:
        return here[slot.address] + max(0, min(num_others, slot.room - here[slot.address]))

    return [
        Placement(rank=rank, tp=tp, pp=pp, gpu=0, num_local=1 if uses_gpus else num_local(slot))
        for rank, slot in enumerate(slots)
    ]

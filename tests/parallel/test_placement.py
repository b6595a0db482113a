"""How many ranks share a machine, and with that its cores and memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shardwright.config import EngineConfig
from shardwright.parallel.mp import placements_of
from shardwright.parallel.ray import placements_in
from shardwright.parallel.ray_cluster import Slot


def config(tp: int, dp: int) -> EngineConfig:
    return EngineConfig.from_options("model", tensor_parallel_size=tp, data_parallel_size=dp)


def slots(*machines: tuple[str, int]) -> list[Slot]:
    return [Slot(bundle=rank, address=address, room=room) for rank, (address, room) in enumerate(machines)]


def test_processes_of_a_machine_share_it_with_other_replicas() -> None:
    assert [placement.num_local for placement in placements_of(config(tp=2, dp=3))] == [6, 6]


@pytest.mark.parametrize(
    ("dp", "machines", "num_local"),
    [
        (1, [("a", 16), ("a", 16)], [2, 2]),
        (3, [("a", 16), ("a", 16)], [6, 6]),
        (3, [("a", 4), ("a", 4)], [4, 4]),  # the others are elsewhere: there is no more room
        (2, [("a", 1), ("b", 16)], [1, 3]),
        (1, [("a", 16), ("b", 16)], [1, 1]),
    ],
)
def test_actors_of_a_machine_share_it_with_other_replicas(
    dp: int, machines: list[tuple[str, int]], num_local: list[int]
) -> None:
    placements = placements_in(config(tp=2, dp=dp), slots(*machines), uses_gpus=False)
    assert [placement.num_local for placement in placements] == num_local


def test_actors_with_gpus_have_one_each() -> None:
    placements = placements_in(config(tp=2, dp=2), slots(("a", 16), ("a", 16)), uses_gpus=True)
    assert [placement.num_local for placement in placements] == [1, 1]


ACTOR = """
import os, sys
import msgspec
from shardwright.parallel.messages import Setup
from shardwright.parallel.ray import RankActor
from shardwright.worker.placement import Placement

os.sched_getaffinity = lambda pid: set(range(12))
actor = RankActor(1, sys.argv[1] or None)
placements = [Placement(rank=rank, tp=2, num_local=4) for rank in range(2)]
actor.carry_out(msgspec.msgpack.encode(Setup(placements=placements, host="127.0.0.1", log_level=30)))
sys.stderr.write(os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize(("asked", "threads"), [("", "3"), ("5", "5")])
def test_an_actor_has_its_share_of_the_cores_unless_the_user_says_otherwise(asked: str, threads: str) -> None:
    ray_says = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ACTOR, asked]
    assert subprocess.run(command, env=ray_says, capture_output=True, check=True, text=True).stderr == threads

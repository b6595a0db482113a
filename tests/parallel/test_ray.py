from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.parallel.served import PROMPTS, add, generate, make_config

from shardwright.engine.core import EngineCore
from shardwright.errors import ConfigError
from shardwright.parallel import ray_cluster
from shardwright.parallel.ray_cluster import check_address

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    """Tokens by one rank."""
    return generate(EngineCore.from_config(make_config(tiny_llama)))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of two Ray nodes on this machine, with room for two ranks each."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 2, "object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    made.add_node(**small)
    yield made.address
    made.shutdown()


def processes_of_ray() -> list[psutil.Process]:
    """Started here, by any descendant of this process."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if any(word in " ".join(p.cmdline()) for word in ("raylet", "gcs_server", "ray::"))]


@pytest.mark.sweep
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_actors_give_the_tokens_of_one_rank(tiny_llama: Path, expected: list[list[int]], tp: int, pp: int) -> None:
    core = EngineCore.from_config(make_config(tiny_llama, tp, pp, "ray"))
    assert processes_of_ray()
    assert generate(core) == expected
    core.close()
    core.close()
    assert not processes_of_ray()
    assert not ray.is_initialized()


def test_requests_go_on_after_an_actor_was_killed(tiny_llama: Path, expected: list[list[int]]) -> None:
    core = EngineCore.from_config(make_config(tiny_llama, 2, 1, "ray"))
    add(core, PROMPTS)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(PROMPTS))}
    step = 0
    while core.has_work:
        step += 1
        if step == 5:
            os.kill(next(p.pid for p in processes_of_ray() if "RankActor" in " ".join(p.cmdline())), signal.SIGKILL)
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
    assert list(tokens.values()) == expected
    assert core.stats.num_restarts == 1
    core.close()
    assert not processes_of_ray()


def test_ranks_spread_over_nodes_and_leave_the_cluster_as_it_was(
    tiny_llama: Path, expected: list[list[int]], cluster: str
) -> None:
    """Four ranks, of which a node has room for two: each stage is on a node of its own."""
    core = EngineCore.from_config(make_config(tiny_llama, 2, 2, "ray", ray_address=cluster))
    slots = core.executor._ranks._slots  # type: ignore[attr-defined]
    nodes = ray.util.placement_group_table(core.executor._ranks._cluster.group)["bundles_to_node_id"]  # type: ignore[attr-defined]
    held = [nodes[slot.bundle] for slot in slots]
    assert held[0] == held[1] != held[2] == held[3]
    assert generate(core) == expected
    core.close()
    ray.init(address=cluster, logging_level="error")
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4
    states = {table["state"] for table in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}
    ray.shutdown()


def test_a_cluster_without_room_is_one_line(tiny_llama: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="6 ranks need a CPU each but the Ray cluster has 4"):
        EngineCore.from_config(make_config(tiny_llama, 3, 2, "ray", ray_address=cluster))
    assert not ray.is_initialized()
    monkeypatch.setattr(ray_cluster, "PLACE_TIMEOUT_S", 2.0)
    ray.init(address=cluster, logging_level="error")
    taken: Any = ray.util.placement_group([{"CPU": 1.0}] * 3, strategy="PACK")
    ray.get(taken.ready(), timeout=30)
    with pytest.raises(ConfigError, match="the Ray cluster has no room for 2 ranks: 1 CPUs and 0 GPUs are free"):
        EngineCore.from_config(make_config(tiny_llama, 2, 1, "ray"))
    assert ray.is_initialized()  # it was not ours
    ray.shutdown()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 .* refused"),
        ("nonsense", "must be host:port, or auto"),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999"),
        ("no.such.host.invalid:6379", "no Ray cluster answers at no.such.host.invalid:6379"),
    ],
)
def test_an_address_that_does_not_answer_is_one_line(tiny_llama: Path, address: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message) as raised:
        EngineCore.from_config(make_config(tiny_llama, 2, 1, "ray", ray_address=address))
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 20


def test_something_else_that_listens_is_no_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(ConfigError, match="what listens there is no Ray"):
            check_address(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - started < 25


def test_ray_that_is_not_installed_says_how_to(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'shardwright\[ray\]'"):
        EngineCore.from_config(make_config(tiny_llama, 2, 1, "ray"))

"""A Ray cluster, found or started, and a place in it for every rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from shardwright.config import EngineConfig
from shardwright.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 15.0
"""Ray itself would try for minutes."""

PLACE_TIMEOUT_S = 60.0
"""How long ranks wait for others to leave the cluster."""

OBJECT_STORE_BYTES = 100 << 20
"""Of a Ray that is started here; messages to ranks are small."""


def import_ray() -> ModuleType:
    """Ray. Raises ConfigError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as exc:
        raise ConfigError(
            "distributed_executor_backend is ray but Ray is not installed: pip install 'shardwright[ray]'"
        ) from exc
    return ray


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a rank goes."""

    bundle: int
    """Of the placement group."""
    address: str
    """Of its machine."""
    room: int
    """Ranks that its machine may hold, of this replica and others."""


class RayCluster:
    """A connection to Ray and a placement group with a bundle per rank. Close it.

    Args:
        config: of the engine.

    Raises: ConfigError if Ray is not installed, does not answer, or has no room.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._ray = ray = import_ray()
        num_ranks = config.parallel.num_ranks
        self.is_ours = not ray.is_initialized()
        address = config.parallel.ray_address or os.environ.get("RAY_ADDRESS")
        if self.is_ours:
            self._connect(address, num_ranks)
        try:
            self.uses_gpus = self._uses_gpus(config.model.device, num_ranks)
            self.group = self._make_group(num_ranks)
        except BaseException:
            self._disconnect()
            raise
        own_room = num_ranks * config.parallel.data_parallel_size if self.is_ours and address is None else None
        self.slots = self._slots(own_room)

    def close(self) -> None:
        """Give the places back, and end a Ray that was started here."""
        self._ray.util.remove_placement_group(self.group)
        self._disconnect()

    def _connect(self, address: str | None, num_ranks: int) -> None:
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": True}
        if address is None:
            cores = len(os.sched_getaffinity(0))
            options |= {
                "address": "local",
                "num_cpus": max(cores, num_ranks),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        else:
            check_address(address)
            options["address"] = address
        with signals_kept():
            try:
                self._ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError) as exc:
                where = "here" if address is None else f"at {address}"
                raise ConfigError(f"there is no Ray cluster {where}: {str(exc).splitlines()[0]}") from exc

    def _disconnect(self) -> None:
        if self.is_ours and self._ray.is_initialized():
            with signals_kept():
                self._ray.shutdown()

    def _uses_gpus(self, device: str, num_ranks: int) -> bool:
        num_gpus = self._ray.cluster_resources().get("GPU", 0)
        if device == "cuda" and num_gpus < num_ranks:
            raise ConfigError(
                f"{num_ranks} ranks need a GPU each but the Ray cluster has {num_gpus:.0f}: use fewer ranks, or "
                "--device cpu"
            )
        return device != "cpu" and num_gpus >= num_ranks

    def _make_group(self, num_ranks: int) -> Any:
        """Reserve a CPU or GPU for every rank, on as few machines as will do."""
        num_cpus = self._ray.cluster_resources().get("CPU", 0)
        if num_cpus < num_ranks:
            raise ConfigError(f"{num_ranks} ranks need a CPU each but the Ray cluster has {num_cpus:.0f}")
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if self.uses_gpus else {})}
        group = self._ray.util.placement_group([bundle] * num_ranks, strategy="PACK")
        try:
            self._ray.get(group.ready(), timeout=PLACE_TIMEOUT_S)
        except self._ray.exceptions.GetTimeoutError as exc:
            self._ray.util.remove_placement_group(group)
            free = self._ray.available_resources()
            raise ConfigError(
                f"the Ray cluster has no room for {num_ranks} ranks: {free.get('CPU', 0):.0f} CPUs and "
                f"{free.get('GPU', 0):.0f} GPUs are free"
            ) from exc
        return group

    def _slots(self, room: int | None) -> list[Slot]:
        """By rank. Ranks of one machine are neighbours, so that those of a pipeline stage are together if they can.

        Args:
            room: of this machine, if all ranks are here, those of replicas that have started a Ray of their own among
                them; None: as many as Ray has CPUs to give.
        """
        nodes: dict[int, str] = self._ray.util.placement_group_table(self.group)["bundles_to_node_id"]
        addresses, num_cpus = {}, Counter[str]()
        for node in self._ray.nodes():
            addresses[node["NodeID"]] = address = node["NodeManagerAddress"]
            num_cpus[address] += int(node["Resources"].get("CPU", 0)) if node["Alive"] else 0
        held = list(nodes.values())
        order = sorted(nodes, key=lambda bundle: (-held.count(nodes[bundle]), nodes[bundle], bundle))
        places = [(bundle, addresses[nodes[bundle]]) for bundle in order]
        return [Slot(bundle=bundle, address=at, room=room or num_cpus[at]) for bundle, at in places]


def check_address(address: str) -> None:
    """Raise ConfigError within some twenty seconds if no Ray answers at an address."""
    wrong = f"no Ray cluster answers at {address}"
    way_out = "start one with `ray start --head`, or leave out --ray-address to have one started here"
    host, _, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"ray_address is {address!r} but must be host:port, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"{wrong} ({exc}): {way_out}") from exc
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"{host}:{port}"]
    try:
        subprocess.run(command, timeout=HEALTH_TIMEOUT_S, check=True, capture_output=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as exc:
        raise ConfigError(f"{wrong} (what listens there is no Ray of this version): {way_out}") from exc


@contextmanager
def signals_kept() -> Iterator[None]:
    """While open, Ray may install handlers for signals; afterwards they are what they were."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

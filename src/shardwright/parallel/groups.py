"""Process groups: torch.distributed among the ranks of one model, gloo on CPUs and NCCL on GPUs.

Ranks find each other through a store at rank 0, on a port that the system gives. Every rank is in the group of its
pipeline stage, whose members share each layer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # they are there, but not declared
from torch.nn import functional

from shardwright.errors import ConfigError
from shardwright.parallel.links import RankLink
from shardwright.worker.placement import Placement

JOIN_TIMEOUT_S = 120.0
"""How long a rank waits for the others to arrive."""

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a rank waits in a step. The executor notices a lost rank long before."""


def open_store(host: str) -> TCPStore:
    """A store where ranks meet, on a free port of this machine; `store.port` says which. Rank 0 keeps it.

    Raises: ConfigError if the address is none of this machine's.
    """
    try:
        return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_TIMEOUT_S))
    except (RuntimeError, OSError) as exc:
        raise ConfigError(f"ranks cannot meet at {host}: {str(exc).splitlines()[0]}") from exc


class ProcessGroups:
    """The groups that this rank is in. One per process.

    Args:
        placement: of this rank.
        store: that rank 0 opened; None: join the one at `host` and `port`.
        host, port: of the store.
        device: of the tensors that are sent.
    """

    def __init__(
        self, placement: Placement, *, host: str, port: int, store: Store | None, device: torch.device
    ) -> None:
        timeout = timedelta(seconds=JOIN_TIMEOUT_S)
        if interface := interface_of(host if store is not None else own_address(host, port)):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        if store is None:
            store = TCPStore(host, port, is_master=False, timeout=timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=placement.rank,
            world_size=placement.num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        self._store = store
        self._device = device
        self.stage = GroupCollectives(None)
        for stage in range(placement.pp):  # every rank takes part in making every group
            ranks = list(range(stage * placement.tp, (stage + 1) * placement.tp))
            group = dist.new_group(ranks) if placement.tp > 1 else None
            if stage == placement.stage:
                self.stage = GroupCollectives(group)

        before, after = placement.rank - placement.tp, placement.rank + placement.tp
        self.source = None if placement.is_first_stage else RankLink(before, device)
        self.target = None if placement.is_last_stage else RankLink(after, device)

    def agree(self, value: bool) -> bool:
        """Whether all ranks say yes."""
        votes = torch.tensor([int(value)], device=self._device)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return bool(votes.item())

    def close(self) -> None:
        """Leave the groups. The others may have gone."""
        dist.destroy_process_group()


class GroupCollectives:
    """Implements layers.collectives.Collectives by a process group.

    Tensors on "meta", with which code is only looked at, are not sent: what comes back has the shape.

    Args:
        group: None for a rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._group is None or tensor.is_meta:
            return tensor
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        if self._group is None:
            return tensor
        if tensor.is_meta:
            return tensor.new_empty(*tensor.shape[:-1], sum(sizes))
        padded = _padded(tensor, max(sizes))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        return _joined(parts, sizes)

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        if self._group is None:
            return tensor
        if tensor.is_meta:
            return tensor.new_empty(*tensor.shape[:-1], sum(sizes)) if self.rank == 0 else None
        padded = _padded(tensor, max(sizes))
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, parts, group=self._group, group_dst=0)
        return None if parts is None else _joined(parts, sizes)


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Its last dimension filled up: what is gathered must have one shape."""
    return functional.pad(tensor, (0, size - tensor.shape[-1])).contiguous()


def _joined(parts: list[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)


def own_address(host: str, port: int) -> str:
    """The address that this machine has towards another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface with an address: gloo would take the one that the machine's name stands for."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    return None

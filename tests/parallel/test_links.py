"""Links between stages over process groups: two processes, of which this one sends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch

from shardwright.parallel.groups import ProcessGroups, open_store
from shardwright.parallel.links import MOST_UNDER_WAY, RankLink
from shardwright.worker.placement import Placement

HOST = "127.0.0.1"
NUM_MESSAGES = 50


def receive_all(port: int) -> None:
    """The other stage: adds up what comes, and says so to all."""
    placement = Placement(rank=1, pp=2)
    groups = ProcessGroups(placement, host=HOST, port=port, store=None, device=torch.device("cpu"))
    assert groups.source is not None
    received = [groups.source.recv() for _ in range(NUM_MESSAGES)]
    groups.agree(
        [tensors[0].tolist() for tensors in received] == [[n] * 1000 for n in range(NUM_MESSAGES)]
        and all(tensors[1].is_meta and tensors[1].shape == (2, 3) for tensors in received)
    )
    groups.close()


@pytest.fixture
def groups() -> Iterator[ProcessGroups]:
    store = open_store(HOST)
    other = multiprocessing.get_context("spawn").Process(target=receive_all, args=(store.port,), daemon=True)
    other.start()
    placement = Placement(rank=0, pp=2)
    made = ProcessGroups(placement, host=HOST, port=store.port, store=store, device=torch.device("cpu"))
    yield made
    made.close()
    other.join(10)
    assert other.exitcode == 0


@pytest.mark.slow
def test_what_was_received_is_not_kept(groups: ProcessGroups) -> None:
    link = groups.target
    assert isinstance(link, RankLink)
    for number in range(NUM_MESSAGES):
        link.send([torch.full((1000,), number), torch.empty(2, 3, device="meta")])
        assert link.num_under_way <= MOST_UNDER_WAY
    assert groups.agree(True)

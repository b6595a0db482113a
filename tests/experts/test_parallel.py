"""Experts of which ranks hold parts run all at once on each, and are added up once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.experts import blocks
from tests.experts.blocks import HIDDEN, WIDTH
from tests.experts.test_loops import make, watched
from torch import Tensor, nn

from shardwright.experts.block import GroupedExperts
from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel import become
from shardwright.layers.parallel_linear import ColumnParallelLinear, RowParallelLinear
from shardwright.layers.parallel_module import SummedOutput
from shardwright.plans.threads import ThreadCollectives, run_ranks

RANGES = (range(10), range(10, HIDDEN))
"""Hidden features of two ranks, dealt unevenly."""


class Counting:
    """Collectives that count sums."""

    def __init__(self, collectives: Collectives) -> None:
        self.rank, self.size = collectives.rank, collectives.size
        self.num_sums = 0
        self._collectives = collectives

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.num_sums += 1
        return self._collectives.all_reduce(tensor)


def cut_linears(model: nn.Module, collectives: Counting) -> None:
    """Each SwiGLU along its hidden features."""
    own = torch.tensor(RANGES[collectives.rank])
    for held in model.modules():
        if isinstance(held, blocks.SwiGLU):
            for linear in (held.w1, held.w3):
                linear.weight = nn.Parameter(linear.weight[own], requires_grad=False)
                linear.__class__, linear.collectives = ColumnParallelLinear, collectives
            held.w2.weight = nn.Parameter(held.w2.weight[:, own], requires_grad=False)
            held.w2.__class__, held.w2.collectives = RowParallelLinear, collectives


def cut_stacks(model: nn.Module, collectives: Counting) -> None:
    """Matrices in one parameter along their hidden features; the whole block is added up."""
    own = torch.tensor(RANGES[collectives.rank])
    block = model.block
    block.up, block.up_bias = (nn.Parameter(p[..., own], requires_grad=False) for p in (block.up, block.up_bias))
    block.down = nn.Parameter(block.down[:, own], requires_grad=False)
    if collectives.rank > 0:
        block.down_bias.zero_()
    become(block, SummedOutput, collectives=collectives)


@pytest.mark.parametrize(
    ("kind", "cut", "num_sums"),
    [(blocks.Mixtral, cut_linears, 1), (blocks.Shared, cut_linears, 2), (blocks.Stacked, cut_stacks, 1)],
)
def test_parts_of_experts(kind: type[nn.Module], cut: Callable[..., None], num_sums: int) -> None:
    whole = make(kind)
    x = torch.randn(1, 23, WIDTH)
    expected = whole(x)

    def run(collectives: ThreadCollectives) -> tuple[Tensor, int]:
        counting = Counting(collectives)
        part = copy.deepcopy(whole)
        cut(part, counting)
        loops = watched(part)
        assert [loop.reason for loop in loops.found] == [""]
        assert isinstance(part.block, GroupedExperts)
        counting.num_sums = 0
        with torch.inference_mode():
            return part(x), counting.num_sums

    for output, sums in run_ranks(2, run):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert sums == num_sums


def test_all_ranks_do_the_same() -> None:
    """If one cannot, none does: they have to add up the same number of times."""
    model = make(blocks.Mixtral)
    assert [loop.reason for loop in watched(model, agree=lambda is_ours: False).found] == [
        "on another rank they run as written"
    ]
    assert type(model.block) is blocks.Mixtral

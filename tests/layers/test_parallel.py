"""Parallel layers of simulated ranks against the layer that they are parts of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel import become, gather_logits_once
from shardwright.layers.parallel_embedding import VocabParallelEmbedding, VocabRows
from shardwright.layers.parallel_experts import localize_choices
from shardwright.layers.parallel_linear import (
    ColumnParallelLinear,
    GatheredColumnParallelLinear,
    RowParallelLinear,
    SplitRowParallelLinear,
)
from shardwright.layers.parallel_module import DividedInput, GatheredOutput, Parallel, SplitInput, SummedOutput
from shardwright.layers.parallel_pieces import Pieces
from shardwright.layers.upcast_linear import UpcastLinear, upcast_linears
from shardwright.plans.threads import run_ranks

UNEVEN = Pieces((((0, 5),), ((5, 7),), ((7, 12),)))
SEGMENTS = Pieces((((0, 2), (6, 7)), ((2, 4), (7, 8)), ((4, 6), (8, 12))))
SHARED = Pieces((((0, 4), (8, 10)), ((4, 6), (8, 10)), ((6, 8), (10, 12))))
"""The first two ranks hold the same two features."""


def on_ranks(pieces: Pieces, fn: Callable[[Collectives], Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return run_ranks(len(pieces.ranges), fn)


def part_of(linear: nn.Linear, pieces: Pieces, rank: int, dim: int) -> nn.Linear:
    weight = pieces.take(linear.weight, rank, dim)
    part = nn.Linear(weight.shape[1], weight.shape[0])
    part.weight.data = weight.clone()
    bias = linear.bias if dim else pieces.take(linear.bias, rank, 0)
    part.bias.data = torch.zeros_like(bias) if dim and rank else bias.clone()
    return part


@st.composite
def dealt(draw: st.DrawFn) -> Pieces:
    """A dimension of a few segments, each cut at any places; some ranks get a range twice over."""
    ranks = draw(st.integers(1, 4))
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    start = 0
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
        ends = [start, *(start + sum(lengths[: i + 1]) for i in range(ranks))]
        for rank, ends_of_rank in enumerate(pairwise(ends)):
            held[rank].append(ends_of_rank)
        start = ends[-1]
    if draw(st.booleans()):
        held[-1].append(held[0][0])
    return Pieces(tuple(tuple(ranges) for ranges in held))


@given(dealt(), st.integers(0, 1))
def test_what_ranks_take_makes_the_whole_again(pieces: Pieces, dim: int) -> None:
    whole = torch.randn(pieces.total, pieces.total)
    parts = [pieces.take(whole, rank, dim) for rank in range(len(pieces.ranges))]
    assert [part.shape[dim] for part in parts] == list(pieces.sizes)

    def gather(collectives: Collectives) -> Tensor:
        return pieces.gather(parts[collectives.rank].movedim(dim, -1), collectives).movedim(-1, dim)

    for gathered in on_ranks(pieces, gather):
        assert torch.equal(gathered, whole)


@pytest.mark.parametrize("pieces", [UNEVEN, SEGMENTS, SHARED], ids=["uneven", "segments", "shared"])
def test_columns_are_gathered_in_order(pieces: Pieces) -> None:
    whole, x = nn.Linear(6, 12), torch.randn(2, 3, 6)

    def run(collectives: Collectives) -> Tensor:
        part = part_of(whole, pieces, collectives.rank, 0)
        become(part, GatheredOutput, collectives=collectives, output_pieces=pieces)
        assert type(part) is GatheredColumnParallelLinear
        return part(x)

    for output in on_ranks(pieces, run):
        torch.testing.assert_close(output, whole(x))


def test_logits_go_to_the_first_rank_alone_and_have_a_shape_elsewhere() -> None:
    whole, x = nn.Linear(6, 12), torch.randn(3, 6)

    def run(collectives: Collectives) -> Tensor:
        model = nn.Sequential(part_of(whole, UNEVEN, collectives.rank, 0))
        become(model[0], GatheredOutput, collectives=collectives, output_pieces=UNEVEN, makes_logits=True)
        gather_logits_once(model)
        output: Tensor = model(x)
        return output

    first, *others = on_ranks(UNEVEN, run)
    torch.testing.assert_close(first, whole(x))
    assert all(torch.equal(other, torch.zeros(3, 12)) for other in others)


@pytest.mark.parametrize("pieces", [UNEVEN, SEGMENTS], ids=["uneven", "segments"])
def test_rows_split_a_whole_input_and_add_the_bias_once(pieces: Pieces) -> None:
    whole, x = nn.Linear(12, 6), torch.randn(2, 3, 12)

    def run(collectives: Collectives) -> Tensor:
        part = part_of(whole, pieces, collectives.rank, 1)
        become(part, SummedOutput, SplitInput, collectives=collectives, input_pieces=pieces)
        assert type(part) is SplitRowParallelLinear
        return part(x)

    for output in on_ranks(pieces, run):
        torch.testing.assert_close(output, whole(x))


def test_rows_take_what_columns_leave_on_the_rank() -> None:
    first, second, x = nn.Linear(6, 12), nn.Linear(12, 6), torch.randn(3, 6)

    def run(collectives: Collectives) -> Tensor:
        columns, rows = (part_of(first, SEGMENTS, collectives.rank, 0), part_of(second, SEGMENTS, collectives.rank, 1))
        become(columns, Parallel, collectives=collectives)
        become(rows, SummedOutput, collectives=collectives)
        assert (type(columns), type(rows)) == (ColumnParallelLinear, RowParallelLinear)
        return rows(columns(x).relu())

    for output in on_ranks(SEGMENTS, run):
        torch.testing.assert_close(output, second(first(x).relu()))


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


@pytest.mark.parametrize("own", [nn.Embedding, Scaled])
@pytest.mark.parametrize("pieces", [UNEVEN, SEGMENTS], ids=["uneven", "segments"])
def test_vocabulary_rows_are_found_on_their_rank_and_scaled_once(own: type[nn.Embedding], pieces: Pieces) -> None:
    whole, ids = own(12, 4, padding_idx=11), torch.arange(12).view(3, 4)

    def run(collectives: Collectives) -> Tensor:
        rows = pieces.take(whole.weight, collectives.rank, 0)
        part = own(len(rows), 4)
        part.weight.data = rows
        become(part, VocabRows, collectives=collectives, row_pieces=pieces)
        assert isinstance(part, own)
        assert own is Scaled or type(part) is VocabParallelEmbedding
        return part(ids)

    for output in on_ranks(pieces, run):
        assert torch.equal(output, whole(ids))


class Twofold(nn.Module):
    def forward(self, x: Tensor, flag: str = "") -> tuple[Tensor, str]:
        return x, flag


def test_of_several_outputs_the_first_is_summed() -> None:
    def run(collectives: Collectives) -> Tensor:
        module = Twofold()
        become(module, SummedOutput, DividedInput, collectives=collectives)
        output, flag = module(torch.full((2,), 6.0), flag="kept")
        assert flag == "kept"
        assert isinstance(module, Twofold)
        return output

    for output in on_ranks(UNEVEN, run):
        assert output.tolist() == [6.0, 6.0]  # a third of it from each of three ranks


@pytest.mark.parametrize("skip", [False, True])
def test_every_choice_of_an_expert_counts_on_one_rank(skip: bool) -> None:
    chosen, weights = torch.randint(12, (20, 3)), torch.rand(20, 3) + 0.1
    total = torch.zeros(20, 12)
    for rank in range(3):
        hidden, local, local_weights = localize_choices([torch.zeros(20, 8), chosen, weights], UNEVEN, rank, skip=skip)
        assert hidden.shape == (20, 8)
        is_here = local_weights > 0
        assert int(local[is_here].max()) < UNEVEN.sizes[rank]
        assert set(local[~is_here].tolist()) == {UNEVEN.sizes[rank] if skip else 0}
        start = UNEVEN.ranges[rank][0][0]
        total.scatter_add_(1, torch.where(is_here, local + start, 0), local_weights)
    torch.testing.assert_close(total, torch.zeros(20, 12).scatter_add_(1, chosen, weights))


def test_experts_without_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="one tensor of chosen experts, and got 0"):
        localize_choices([torch.zeros(2, 3)], UNEVEN, 0, skip=False)


def test_parallel_linears_are_upcast_and_still_summed() -> None:
    whole, x = nn.Linear(12, 6, dtype=torch.bfloat16), torch.randn(9, 12, dtype=torch.bfloat16)

    def run(collectives: Collectives) -> Tensor:
        part = part_of(whole, UNEVEN, collectives.rank, 1)
        become(part, SummedOutput, SplitInput, collectives=collectives, input_pieces=UNEVEN)
        assert upcast_linears(part) == 1
        assert isinstance(part, UpcastLinear)
        assert isinstance(part, SplitRowParallelLinear)
        return part(x)

    for output in on_ranks(UNEVEN, run):
        torch.testing.assert_close(output.float(), whole.float()(x.float()), atol=0.03, rtol=0.02)

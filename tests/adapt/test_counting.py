"""What code does with its counts of tokens is found by following them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.count_calls import CountCalls, tables_of
from shardwright.adapt.counting import CountFollower, CountingMode, Use

NUM_TOKENS = 13
TABLE = torch.randn(32, 6)


class Model(nn.Module):
    """Does something with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", TABLE)
        self.embedding = nn.Embedding(32, 6)


def as_positions(model: Model, tokens: Tensor) -> Tensor:
    return model.embedding(tokens) + model.embedding(torch.arange(NUM_TOKENS))


def as_angles(model: Model, tokens: Tensor) -> Tensor:
    return model.embedding(tokens) * torch.outer(torch.arange(NUM_TOKENS).float(), torch.ones(6)).cos()


def picked_from(model: Model, tokens: Tensor) -> Tensor:
    angles = torch.einsum("i,j->ij", torch.arange(0, NUM_TOKENS).float(), torch.ones(6))
    position_ids = tokens * 0 + torch.tensor(range(NUM_TOKENS))
    return model.embedding(tokens) * torch.cat((angles, angles), -1).cos()[position_ids, :6]


def as_places(model: Model, tokens: Tensor) -> Tensor:
    return model.embedding(tokens)[:, torch.arange(NUM_TOKENS)]


def rows_of_a_table(model: Model, tokens: Tensor) -> Tensor:
    return model.embedding(tokens) + model.get_buffer("table")[:NUM_TOKENS].unsqueeze(0)


def picked_from_a_table(model: Model, tokens: Tensor) -> Tensor:
    rows = model.get_buffer("table")[:NUM_TOKENS].to(torch.float64)
    return model.embedding(tokens) + torch.gather(rows, 0, torch.zeros(NUM_TOKENS, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("code", "use"),
    [
        (as_positions, Use.POSITIONS),
        (as_angles, Use.POSITIONS),
        (picked_from, Use.WHOLE),
        (as_places, Use.PLACES),
        (rows_of_a_table, Use.POSITIONS),
        (picked_from_a_table, Use.WHOLE),
    ],
)
def test_counts_are_followed(code: Any, use: Use) -> None:
    model, tokens = Model(), torch.randint(32, (1, NUM_TOKENS))
    follower = CountFollower(CountCalls(tables_of(model)), NUM_TOKENS)
    with CountingMode(follower):
        code(model, tokens)
    assert list(follower.uses.values()) == [use]

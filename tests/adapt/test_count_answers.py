"""Code that counts its tokens to know their positions gets the true ones back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from shardwright.adapt.count_answers import AnsweringMode, CountAnswers
from shardwright.adapt.count_calls import Count, CountCalls
from shardwright.adapt.counting import Use
from shardwright.errors import UnsupportedModelError

POSITIONS = torch.tensor([7, 0, 1, 2, 30])
TABLE = torch.randn(32, 6)
FIRST, SECOND, ROWS = Count(None, 0), Count(None, 1), Count(id(TABLE), 0)


@contextmanager
def answered(uses: dict[Count, Use], position_ids: Tensor = POSITIONS[None]) -> Iterator[CountAnswers]:
    answers = CountAnswers(CountCalls([TABLE]), uses, num_positions=32)
    answers.begin(position_ids)
    with AnsweringMode(answers):
        yield answers


def test_the_call_that_counted_gets_positions_and_no_other() -> None:
    with answered({SECOND: Use.POSITIONS}):
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]
        assert torch.arange(0, 5).tolist() == POSITIONS.tolist()
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_positions_come_in_the_type_asked_for_and_may_be_changed() -> None:
    with answered({FIRST: Use.POSITIONS, SECOND: Use.POSITIONS}):
        for count in (torch.arange(5.0), torch.arange(5, dtype=torch.float32)):
            assert count.dtype is torch.float32
            assert count.add_(1).tolist() == [8, 1, 2, 3, 31]
    assert POSITIONS.tolist() == [7, 0, 1, 2, 30]


def test_rows_of_a_table_are_those_of_the_positions() -> None:
    with answered({ROWS: Use.POSITIONS}):
        assert torch.equal(TABLE[:5, None], TABLE.index_select(0, POSITIONS)[:, None])


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_running_sums_of_ones_are_one_more(dtype: torch.dtype) -> None:
    sums = {Count("cumsum", 0): Use.POSITIONS}
    for position_ids in (POSITIONS[None], POSITIONS[:, None]):
        with answered(sums, position_ids) as answers:
            summed = torch.ones(position_ids.shape, dtype=dtype).cumsum(1, dtype=dtype)
        answers.end()
        assert torch.equal(summed, (position_ids + 1).to(dtype))
    with answered(sums), pytest.raises(UnsupportedModelError, match="counts None"):
        torch.tensor([[1, 1, 0, 1, 1]]).cumsum(1)


def test_narrowed_tables_give_the_rows_of_positions() -> None:
    with answered({ROWS: Use.POSITIONS}):
        assert torch.equal(TABLE.narrow(0, 0, 5), TABLE.index_select(0, POSITIONS))


def test_what_is_picked_from_by_positions_is_whole() -> None:
    with answered({FIRST: Use.WHOLE, ROWS: Use.WHOLE}):
        assert torch.arange(5).tolist() == list(range(32))
        assert TABLE[:5].shape == TABLE.shape


def test_places_stay() -> None:
    for position_ids in (POSITIONS[None], POSITIONS[:, None]):
        with answered({FIRST: Use.PLACES}, position_ids) as answers:
            num_tokens = position_ids.shape[1]
            assert torch.arange(num_tokens).tolist() == list(range(num_tokens))
        answers.end()


def test_sequences_of_a_batch_cannot_share_positions() -> None:
    with answered({FIRST: Use.POSITIONS}, POSITIONS[:, None]), pytest.raises(UnsupportedModelError, match="the same"):
        torch.arange(1)
    with answered({FIRST: Use.POSITIONS}, torch.tensor([[9]])):
        assert torch.arange(1).tolist() == [9]


def test_a_count_of_something_else_in_its_place_is_an_error() -> None:
    with answered({FIRST: Use.POSITIONS}), pytest.raises(UnsupportedModelError, match="counts 4 .* but has 5"):
        torch.arange(4)


def test_a_count_that_is_left_out_is_an_error() -> None:
    with answered({FIRST: Use.POSITIONS, SECOND: Use.PLACES}) as answers:
        torch.arange(5)
    with pytest.raises(UnsupportedModelError, match="another path"):
        answers.end()
    answers.begin(POSITIONS[None])
    with AnsweringMode(answers):
        torch.arange(5)
        torch.arange(5)
    answers.end()

"""What is added to scores is understood as slopes or a table, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwright.adapt.bias import Bias, distances_from, read_bias
from shardwright.errors import UnsupportedModelError

LENGTH = 40
ROWS = torch.arange(LENGTH)
SEEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
DISTANCES = distances_from(ROWS, LENGTH)
SLOPES = torch.tensor([-0.5, -0.25, -1.0, 0.125])
EXACT = torch.finfo(torch.float32).eps


def read(added: Tensor, *, seen: Tensor = SEEN, rows: Tensor = ROWS, ignores_rows: bool = True) -> Bias | None:
    hidden = added.masked_fill(~seen, float("-inf"))
    return read_bias(hidden, seen, rows, precision=EXACT, ignores_rows=ignores_rows)


def test_nothing_is_added() -> None:
    assert read(torch.zeros(4, LENGTH, LENGTH)) is None


def test_the_same_for_a_whole_row_is_nothing() -> None:
    shifts = torch.randn(4, LENGTH, 1).expand(-1, -1, LENGTH)
    assert read(shifts) is None
    with pytest.raises(UnsupportedModelError, match="more than the distance"):
        read(shifts, ignores_rows=False)


@pytest.mark.parametrize("added", [SLOPES[:, None, None] * DISTANCES, -SLOPES[:, None, None] * ROWS])
def test_slopes_count_distances_or_positions_of_keys(added: Tensor) -> None:
    bias = read(added.expand(4, LENGTH, LENGTH))
    assert bias is not None
    assert bias.table_HN is None
    torch.testing.assert_close(bias.over(1000), SLOPES[:, None] * torch.arange(1000))


def test_slopes_in_a_window() -> None:
    seen = SEEN & (DISTANCES < 5)
    bias = read(SLOPES[:, None, None] * DISTANCES, seen=seen)
    assert bias is not None
    torch.testing.assert_close(bias.slopes_H, SLOPES)


def test_slopes_that_were_rounded() -> None:
    added = (-SLOPES[:, None, None] * torch.arange(500)).bfloat16().float().expand(4, 500, 500)
    seen = torch.ones(500, 500, dtype=torch.bool).tril()
    bias = read_bias(added, seen, torch.arange(500), precision=torch.finfo(torch.bfloat16).eps)
    assert bias is not None
    torch.testing.assert_close(bias.slopes_H, SLOPES, rtol=1e-2, atol=0)


def test_a_table_that_settles_reaches_any_distance() -> None:
    table = torch.randn(4, 12)
    bias = read(table[:, DISTANCES.clamp_max(11)], ignores_rows=False)
    assert bias is not None
    known = bias.over(1000)
    torch.testing.assert_close(
        known[:, torch.arange(100).clamp_max(known.shape[1] - 1)], table[:, torch.arange(100).clamp_max(11)]
    )


def test_a_table_that_goes_on_is_known_as_far_as_it_was_seen() -> None:
    bias = read(torch.randn(4, LENGTH)[:, DISTANCES])
    assert bias is not None
    assert bias.over(LENGTH).shape == (4, LENGTH)
    with pytest.raises(UnsupportedModelError, match="only the first 40 distances are known"):
        bias.over(LENGTH + 1)


def test_some_rows_are_enough() -> None:
    table, rows = torch.randn(4, LENGTH), torch.tensor([0, 7, 30, LENGTH - 1])
    bias = read(table[:, distances_from(rows, LENGTH)], seen=SEEN[rows], rows=rows, ignores_rows=False)
    assert bias is not None
    torch.testing.assert_close(bias.over(LENGTH), table)


def test_what_depends_on_keys_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="more than the distance"):
        read(torch.randn(4, 1, LENGTH).expand(-1, LENGTH, -1))

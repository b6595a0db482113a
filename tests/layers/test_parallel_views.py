"""Sizes of the whole in code that views a part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shardwright.layers.parallel import become
from shardwright.layers.parallel_views import KnownViews, LearnedViews, LocalViews, Sizes
from shardwright.plans.threads import run_ranks

(ALONE,) = run_ranks(1, lambda collectives: collectives)


class Viewing(nn.Module):
    """Views its input as a function does."""

    def __init__(self, view: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor, *sizes: int) -> Tensor | tuple[Tensor, ...]:
        return self.view(x, *sizes)


def with_views(view: Callable[..., Tensor | tuple[Tensor, ...]], known: KnownViews) -> Viewing:
    module = Viewing(view)
    become(module, LocalViews, collectives=ALONE, known_views=known)
    return module


def heads_of_whole(x: Tensor, batch: int, length: int) -> Tensor:
    return x.view(batch, length, 4, 8)


def learned(view: Callable[..., Tensor | tuple[Tensor, ...]], x: Tensor, *sizes: int) -> KnownViews:
    views = LearnedViews(candidates={4: (2,), 32: (16,)})
    with_views(view, views)(x, *sizes)
    return KnownViews(views.at)


@given(batch=st.integers(1, 5), length=st.integers(1, 9))
def test_what_is_learned_once_holds_for_every_batch_and_length(batch: int, length: int) -> None:
    known = learned(heads_of_whole, torch.rand(1, 7, 16), 1, 7)
    x = torch.rand(batch, length, 16)
    output = with_views(heads_of_whole, known)(x, batch, length)
    assert isinstance(output, Tensor)
    assert torch.equal(output, x.view(batch, length, 2, 8))


def test_a_size_that_follows_from_the_others_is_not_taken_for_right_where_it_fits_by_accident() -> None:
    def heads(x: Tensor) -> Tensor:
        return x.view(1, -1, 4, 8)

    known = learned(heads, torch.rand(1, 7, 16))
    output = with_views(heads, known)(torch.rand(1, 6, 16))
    assert isinstance(output, Tensor)
    assert output.shape == (1, 6, 2, 8)


def test_sizes_that_are_multiples_of_a_cut_one_are_this_ranks_multiples() -> None:
    def rows(x: Tensor, batch: int) -> Tensor:
        return x.reshape(batch * 4, 7, 8)

    known = learned(rows, torch.rand(1, 2, 7, 8), 1)
    output = with_views(rows, known)(torch.rand(3, 2, 7, 8), 3)
    assert isinstance(output, Tensor)
    assert output.shape == (6, 7, 8)


@pytest.mark.parametrize("function", [torch.reshape, Tensor.reshape, Tensor.view])
def test_views_that_fit_are_left_alone(function: Callable[..., Tensor]) -> None:
    known = LearnedViews(candidates={4: (2,), 32: (16,)})
    output = with_views(lambda x: function(x, (1, 4, 32)), known)(torch.rand(1, 128))
    assert isinstance(output, Tensor)
    assert output.shape == (1, 4, 32)
    assert known.at == {}


def test_a_split_into_several_sizes_is_a_split_of_the_part() -> None:
    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.split([32, 4, 4], dim=-1)

    known = learned(split, torch.rand(2, 20))
    assert [part.shape[-1] for part in with_views(split, known)(torch.rand(3, 20))] == [16, 2, 2]


def test_what_was_not_learned_fails_as_the_code_does_by_itself() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        with_views(heads_of_whole, KnownViews())(torch.rand(1, 7, 16), 1, 7)


def test_where_sizes_fit_in_two_ways_the_preferred_one_is_taken() -> None:
    def square(x: Tensor) -> Tensor:
        return x.view(1, 4, 4, 3)

    x = torch.rand(1, 24)
    first = LearnedViews(candidates={4: (2,)})
    assert with_views(square, first)(x).shape == (1, 2, 4, 3)  # type: ignore[union-attr]
    (place,) = first.ways
    assert first.ways[place] == 2
    second = LearnedViews(candidates={4: (2,)}, preferred={place: 1})
    assert with_views(square, second)(x).shape == (1, 4, 2, 3)  # type: ignore[union-attr]


def test_sizes_that_are_no_multiple_are_others() -> None:
    sizes = Sizes((1,), (4,), (2,))
    assert sizes.applied((1, 12)) == (1, 6)
    assert sizes.applied((1, 6)) is None
    assert sizes.applied((1,)) is None

"""What was understood of the first positions is held against what code does at far ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.adapt.bias import Bias, distances_from
from shardwright.adapt.far_fit import far_rows, fit_far
from shardwright.adapt.fit import FittedAttention
from shardwright.attention.layout import AttentionParams
from shardwright.cache.spec import LayerSpec, Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError

NEAR, FAR = 100, 700
EXACT = torch.finfo(torch.float32).eps
SLOPES = torch.tensor([-20.0, -0.5])
ROWS = far_rows(NEAR, FAR, torch.device("cpu"))


FULL = Visibility()


def attention(visibility: Visibility = FULL, bias: Bias | None = None) -> FittedAttention:
    return FittedAttention(LayerSpec("layer", 2, 2, 8, 8, visibility), AttentionParams(scale=1.0), 1, bias)


def allowed(visibility: Visibility) -> Tensor:
    first = torch.tensor([visibility.first_visible(i) for i in ROWS.tolist()])[:, None]
    return ((torch.arange(FAR) <= ROWS[:, None]) & (torch.arange(FAR) >= first))[None]


def fit(near: FittedAttention, added: Tensor) -> FittedAttention:
    return fit_far(near, added, ROWS, num_near=NEAR, precision=EXACT)


def as_near(visibility: Visibility) -> Visibility:
    """What the first positions show of it."""
    return visibility if visibility.size is not None and visibility.size < NEAR else Visibility()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([VisibilityKind.SLIDING, VisibilityKind.CHUNKED]),
    size=st.integers(1, FAR - 1),
    is_added=st.booleans(),
)
def test_windows_and_chunks_of_any_size_are_found(kind: VisibilityKind, size: int, is_added: bool) -> None:
    visibility = Visibility(kind, size)
    mask = allowed(visibility)
    added = torch.zeros(1, len(ROWS), FAR).masked_fill(~mask, float("-inf")) if is_added else mask
    found = fit(attention(as_near(visibility)), added).spec.visibility
    assert all(found.first_visible(i) == visibility.first_visible(i) for i in range(FAR))


def test_full_attention_stays_full() -> None:
    assert fit(attention(), allowed(Visibility())).spec.visibility == Visibility()


def test_a_window_that_is_there_for_long_prompts_alone_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="in a pass of 700 tokens: its mask is neither"):
        fit(attention(), allowed(Visibility(VisibilityKind.SLIDING, 20)))


def test_a_steep_slope_hides_nothing() -> None:
    added = (SLOPES[:, None, None] * distances_from(ROWS, FAR)).masked_fill(~allowed(Visibility()), float("-inf"))
    found = fit(attention(bias=Bias(SLOPES)), added)
    assert found.spec.visibility == Visibility()
    assert found.bias is not None
    torch.testing.assert_close(found.bias.slopes_H, SLOPES)


def test_a_table_is_known_farther() -> None:
    table = torch.randn(2, FAR)
    added = table[:, distances_from(ROWS, FAR)].masked_fill(~allowed(Visibility()), float("-inf"))
    near = attention(bias=Bias(torch.zeros(2), table[:, :NEAR], is_settled=False))
    found = fit(near, added).bias
    assert found is not None
    torch.testing.assert_close(found.over(FAR), table)


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_a_bias_that_depends_on_the_number_of_tokens_is_refused(factor: float) -> None:
    added = (factor * SLOPES[:, None, None] * distances_from(ROWS, FAR)).masked_fill(
        ~allowed(Visibility()), float("-inf")
    )
    with pytest.raises(UnsupportedModelError, match="its bias depends on the number of tokens"):
        fit(attention(bias=Bias(SLOPES / 10)), added / 10)


def test_columns_of_sinks_are_left_out() -> None:
    mask = torch.zeros(2, len(ROWS), FAR).masked_fill(~allowed(Visibility()), float("-inf"))
    added = torch.cat([torch.full((2, len(ROWS), 1), 3.0), mask], dim=-1)
    assert fit(replace(attention(), first_column=1), added).bias is None

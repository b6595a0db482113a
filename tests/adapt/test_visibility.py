"""What a mask function lets through is found by asking it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils

from shardwright.adapt.visibility import FARTHEST, read_visibility
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

kinds = st.just(Visibility()) | st.builds(
    Visibility, st.sampled_from([VisibilityKind.SLIDING, VisibilityKind.CHUNKED]), st.integers(1, 300)
)


def mask_of(visibility: Visibility) -> Mask:
    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= visibility.first_visible(int(query))) & (key <= query)

    return mask


@settings(max_examples=150, deadline=None)
@given(visibility=kinds, num_positions=st.integers(1, 500), has_hint=st.booleans())
def test_every_kind_is_recognised(visibility: Visibility, num_positions: int, has_hint: bool) -> None:
    """Exactly, or as another that is the same for all positions that will occur. Chunks always come with a hint."""
    hint = visibility.size if has_hint or visibility.kind is VisibilityKind.CHUNKED else None
    found = read_visibility(mask_of(visibility), num_positions=num_positions, size_hint=hint)
    for position in range(num_positions):
        assert found.first_visible(position) == visibility.first_visible(position)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    result: Tensor = masking_utils.causal_mask_function(b, h, q, k)  # type: ignore[arg-type,assignment]
    return result


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal, Visibility()),
        (masking_utils.sliding_window_causal_mask_function(16), Visibility(VisibilityKind.SLIDING, 16)),
        (masking_utils.chunked_causal_mask_function(16, torch.zeros(1)), Visibility(VisibilityKind.CHUNKED, 16)),
        (masking_utils.sliding_window_causal_mask_function(4096), Visibility()),
    ],
    ids=["full", "sliding", "chunked", "window longer than any sequence"],
)
def test_masks_of_transformers_are_recognised(mask: Mask, expected: Visibility) -> None:
    assert read_visibility(mask, num_positions=256, size_hint=expected.size) == expected


def test_a_window_as_long_as_the_longest_sequence_is_none() -> None:
    mask = masking_utils.sliding_window_causal_mask_function(16)
    assert read_visibility(mask, num_positions=16, size_hint=16) == Visibility()


def test_very_long_models_are_not_probed_to_their_end() -> None:
    asked = []

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        asked.append(len(key))
        return key <= query

    assert read_visibility(mask, num_positions=10 * FARTHEST, size_hint=None) == Visibility()
    assert max(asked) <= FARTHEST + 1


def bidirectional(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k >= 0


def one_ahead(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q + 1


def with_holes(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((k + 2) % 7 != 0)


def first_token_always(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((k > q - 16) | (k == 0))


def half_of_the_past(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (k >= q // 2)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (bidirectional, "not causal, or has holes"),
        (one_ahead, "not causal, or has holes"),
        (with_holes, "not causal, or has holes"),
        (first_token_always, "not causal, or has holes"),
        (half_of_the_past, "neither full, sliding nor chunked"),
    ],
)
def test_other_masks_are_refused(mask: Mask, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        read_visibility(mask, num_positions=256, size_hint=None)


def test_a_mask_over_what_is_in_the_prompt_counts_as_its_causal_part() -> None:
    """Masks of models with images look into tables of the prompt's tokens; a text has no such places."""
    table = torch.zeros(13, dtype=torch.bool)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) | table[query]

    assert read_visibility(mask, num_positions=256, size_hint=None) == Visibility()

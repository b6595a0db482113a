"""The native choice of the most likely token against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels.greedy import greedy, greedy_reference
from shardwright.kernels.jit import native_library


def told(found: tuple[np.ndarray, np.ndarray]) -> tuple[list[int], list[bool]]:
    token_ids, are_nan = found
    return token_ids.tolist(), are_nan.tolist()


pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")


@settings(max_examples=150)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    values=st.integers(1, 50),
    is_strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference(
    rows: int, vocab: int, dtype: torch.dtype, values: int, is_strided: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-values, values, (rows, vocab + 7 * is_strided), generator=generator).to(dtype)
    logits = whole[:, :vocab]  # with many equal ones
    assert told(greedy(logits)) == told(greedy_reference(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 5, 1023, 1024, 2500])
def test_what_is_not_a_number_is_the_largest(dtype: torch.dtype, place: int) -> None:
    logits = torch.full((3, 2501), 2.0, dtype=dtype)
    logits[0, place] = torch.nan
    logits[1, place] = torch.inf
    logits[2] = -torch.inf
    assert told(greedy(logits)) == told(greedy_reference(logits)) == ([place, place, 0], [True, False, False])
    assert told(greedy(logits[:1])) == ([place], [True])

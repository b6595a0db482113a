"""Norms of one launch give what plain PyTorch gives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels import norm as plain
from shardwright.kernels.norm import NormKind
from shardwright.kernels.triton.norm import norm

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative: a little more than a unit in the last place: sums in another order may be rounded to the neighbour."""

MOST_ROUNDED_OTHERWISE = 0.02
"""Part of the numbers."""


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    size=st.integers(1, 300),
    dtypes=st.tuples(*[st.sampled_from(list(ROUNDING))] * 2),
    kind=st.builds(
        NormKind,
        st.booleans(),
        st.sampled_from([1e-5, 1e-2, 1.0]),
        st.sampled_from([0.0, 1.0, -0.5]),
        st.booleans(),
    ),
    has_bias=st.booleans(),
    layout=st.sampled_from(["contiguous", "gaps", "transposed", "columns"]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    shape: list[int],
    size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    kind: NormKind,
    has_bias: bool,
    layout: str,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype, weight_dtype = dtypes
    rows = (scale * torch.randn(*shape, size + 5, generator=generator)).to(dtype)[..., :size]
    if layout == "contiguous":
        rows = rows.contiguous()
    elif layout == "transposed" and len(shape) > 1:
        rows = rows.transpose(0, 1)
    elif layout == "columns" and shape:
        rows = rows.mT.contiguous().mT if len(shape) > 1 else rows.t().contiguous().t()
    weight, bias = (torch.randn(size, generator=generator).to(weight_dtype) for _ in range(2))
    given_rows = rows.clone()
    actual = norm(rows, weight, bias if has_bias else None, kind)
    expected = plain.norm(rows, weight, bias if has_bias else None, kind)
    assert actual.dtype is dtype
    assert actual.shape == rows.shape
    tolerance = ROUNDING[dtype] * (1 + kind.rounds_first)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    if dtype is not torch.float32:
        assert int((actual != expected).sum()) <= 1 + MOST_ROUNDED_OTHERWISE * actual.numel()
    assert torch.equal(rows, given_rows)

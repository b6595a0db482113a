"""Gated activations of one launch give what plain PyTorch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.triton.test_norm import MOST_ROUNDED_OTHERWISE, ROUNDING

from shardwright.kernels import gated as plain
from shardwright.kernels.gated import Activation
from shardwright.kernels.triton import gated as launcher
from shardwright.kernels.triton.gated import gated


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    size=st.integers(1, 200),
    dtype=st.sampled_from(list(ROUNDING)),
    activation=st.sampled_from(list(Activation)),
    is_gate_first=st.booleans(),
    layout=st.sampled_from(["contiguous", "gaps", "transposed"]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    shape: list[int],
    size: int,
    dtype: torch.dtype,
    activation: Activation,
    is_gate_first: bool,
    layout: str,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    both = (scale * torch.randn(*shape, 2 * size + 3, generator=generator)).to(dtype)[..., : 2 * size]
    if layout == "contiguous":
        both = both.contiguous()
    elif layout == "transposed" and len(shape) > 1:
        both = both.transpose(0, 1)
    actual = gated(both, activation, is_gate_first=is_gate_first)
    expected = plain.gated(both, activation, is_gate_first=is_gate_first)
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    tolerance = 2 * ROUNDING[dtype]  # rounded twice
    # Of a very negative gate torch takes 1 + tanh or 1 + erf, of which little is left but what was rounded.
    left = 1e-5 * float(both.float().square().amax()) if both.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2 + left)
    if dtype is not torch.float32:
        differs = (actual != expected) & (expected.abs() > left)
        assert int(differs.sum()) <= 1 + MOST_ROUNDED_OTHERWISE * actual.numel()


def test_long_rows_are_dealt_to_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "NUMBERS", 16)
    both = torch.randn(3, 2 * 37, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gated(both, Activation.SILU), plain.gated(both, Activation.SILU))


@pytest.mark.parametrize("activation", Activation)
def test_large_numbers_and_none(activation: Activation) -> None:
    gate = torch.tensor([100.0, -100.0, 1e10, -1e10, float("nan"), 0.0])
    both = torch.cat([gate, torch.ones(6)])
    torch.testing.assert_close(gated(both, activation), plain.gated(both, activation), equal_nan=True)

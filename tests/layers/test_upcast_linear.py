"""Half-precision linears computed in float32: same parameters, results rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardwright.layers import upcast_linear
from shardwright.layers.upcast_linear import MIN_TOKENS, UpcastLinear, has_fast_half_products, upcast_linears


def make_linear(in_features: int, out_features: int, dtype: torch.dtype, *, has_bias: bool) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(in_features + out_features)
        return nn.Linear(in_features, out_features, bias=has_bias).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scratch=st.integers(1, 300),
)
def test_results_are_those_of_float32_rounded(
    num_tokens: int, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, scratch: int
) -> None:
    linear = make_linear(in_features, out_features, dtype, has_bias=has_bias)
    inputs = torch.linspace(-2, 2, num_tokens * in_features).view(num_tokens, in_features).to(dtype)
    bias = linear.bias.float() if has_bias else None
    expected = F.linear(inputs.float(), linear.weight.float(), bias)
    assert upcast_linears(linear) == 1
    assert isinstance(linear, UpcastLinear)
    linear.scratch = torch.empty(max(scratch, in_features))  # as small as this, the weight comes in several pieces
    with torch.inference_mode():
        actual = linear(inputs)
    assert actual.dtype is dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected, rtol=step, atol=step)


def test_leading_dimensions_are_kept() -> None:
    linear = make_linear(6, 4, torch.bfloat16, has_bias=True)
    inputs = torch.ones(2, MIN_TOKENS, 6, dtype=torch.bfloat16)
    upcast_linears(linear)
    with torch.inference_mode():
        assert linear(inputs).shape == (2, MIN_TOKENS, 4)


def test_parameters_and_names_stay() -> None:
    module = nn.Sequential(make_linear(4, 4, torch.bfloat16, has_bias=True), nn.ReLU())
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    assert upcast_linears(module) == 1
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == before


@pytest.mark.parametrize("kind", ["float32", "subclass"])
def test_others_are_left_alone(kind: str) -> None:
    class Own(nn.Linear):
        """Does something else in its forward, for all we know."""

    linear = nn.Linear(4, 4) if kind == "float32" else Own(4, 4).bfloat16()
    before = type(linear)
    assert upcast_linears(linear) == 0
    assert type(linear) is before


@pytest.mark.parametrize("has_amx", [False, True])
def test_half_precision_products_of_x86_are_fast_with_tiles_alone(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool
) -> None:
    monkeypatch.setattr(upcast_linear.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert has_fast_half_products.__wrapped__() is has_amx

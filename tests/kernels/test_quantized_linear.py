"""The native linear with quantized weights against its torch reference, over shapes on and off its tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels import jit
from shardwright.kernels.quantized_linear import (
    MAX_TOKENS,
    has_kernel,
    quantized_linear,
    quantized_linear_reference,
)
from shardwright.kernels.quantized_weight import QuantizedWeight, quantize
from shardwright.weight_format import WeightFormat


def make_weight(outputs: int, inputs: int, format: WeightFormat) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    return quantize(torch.randn(outputs, inputs, generator=generator), format)


def make_input(tokens: int, inputs: int, dtype: torch.dtype, *, is_strided: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    shape = (inputs, tokens) if is_strided else (tokens, inputs)
    drawn = torch.randn(*shape, generator=generator).to(dtype)
    return drawn.T if is_strided else drawn


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 2 * MAX_TOKENS),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([32, 64, 96, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_bias=st.booleans(),
    is_strided=st.booleans(),
)
def test_equals_the_reference(
    tokens: int, inputs: int, outputs: int, bits: Any, group_size: int, dtype: torch.dtype, has_bias: bool,
    is_strided: bool,
) -> None:  # fmt: skip
    weight = make_weight(outputs, inputs, WeightFormat(bits, group_size))
    assert has_kernel(weight) == (group_size != 20)
    x = make_input(tokens, inputs, dtype, is_strided=is_strided)
    bias = torch.linspace(-1, 1, 2 * outputs).to(dtype)[::2] if has_bias else None
    actual, expected = quantized_linear(x, weight, bias), quantized_linear_reference(x, weight, bias)
    assert actual.dtype is dtype
    # The order of float32 sums may differ: noise in float32, and at most one step of the type apart.
    step = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-5 + step, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_do_not_depend_on_those_beside_them(bits: Any) -> None:
    weight = make_weight(40, 96, WeightFormat(bits, 32))
    x = make_input(MAX_TOKENS, 96, torch.float32)
    x[3], x[5] = float("inf"), float("nan")
    together = quantized_linear(x, weight, None)
    alone = torch.cat([quantized_linear(row[None], weight, None) for row in x])
    assert together[5].isnan().all()
    others = [i for i in range(MAX_TOKENS) if i not in (3, 5)]
    torch.testing.assert_close(together[others], alone[others], rtol=1e-5, atol=1e-4)


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = make_weight(8, 64, WeightFormat(4, 32)), make_input(3, 64, torch.bfloat16)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    jit.native_library.cache_clear()
    try:
        assert not has_kernel(weight)
        assert torch.equal(quantized_linear(x, weight, None), quantized_linear_reference(x, weight, None))
    finally:
        jit.native_library.cache_clear()

"""The native linear with packed codes against its torch reference, over shapes on and off its tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels.packed_codes import (
    PackedCodes,
    coded_linear,
    coded_linear_reference,
    pack_codes,
    unpack_codes,
)
from shardwright.kernels.packed_linear import is_available
from shardwright.kernels.quantized_weight import QuantizedWeight, quantize
from shardwright.weight_format import WeightFormat

pytestmark = pytest.mark.skipif(not is_available(), reason="no C++ compiler")


def make_weight(outputs: int, inputs: int, format: WeightFormat) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    return quantize(torch.randn(outputs, inputs, generator=generator), format)


def packed_weight(outputs: int, inputs: int, format: WeightFormat) -> PackedCodes:
    return pack_codes(make_weight(outputs, inputs, format))


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(1, 100),
    outputs=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([32, 64, 5]),
)
def test_packing_loses_nothing(inputs: int, outputs: int, bits: Any, group_size: int) -> None:
    weight = make_weight(outputs, inputs, WeightFormat(bits, group_size))
    again = unpack_codes(pack_codes(weight))
    for one, other in zip(weight, again, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 30),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([32, 64, 96, 20, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_bias=st.booleans(),
    is_strided=st.booleans(),
)
def test_equals_the_reference(
    tokens: int, inputs: int, outputs: int, bits: Any, group_size: int, dtype: torch.dtype, has_bias: bool,
    is_strided: bool,
) -> None:  # fmt: skip
    weight = packed_weight(outputs, inputs, WeightFormat(bits, group_size))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(*((inputs, tokens) if is_strided else (tokens, inputs)), generator=generator).to(dtype)
    x = x.T if is_strided else x
    bias = torch.linspace(-1, 1, outputs) if has_bias else None
    actual, expected = coded_linear(x, weight, bias), coded_linear_reference(x, weight, bias)
    assert actual.dtype is dtype
    # The order of float32 sums may differ: noise in float32, and at most one step of the type apart.
    step = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-5 + step, atol=2e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_do_not_depend_on_those_beside_them(bits: Any) -> None:
    weight = packed_weight(40, 96, WeightFormat(bits, 32))
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    x[3], x[5] = float("inf"), float("nan")
    together = coded_linear(x, weight, None)
    alone = torch.cat([coded_linear(row[None], weight, None) for row in x])
    assert together[5].isnan().all()
    others = [i for i in range(16) if i not in (3, 5)]
    torch.testing.assert_close(together[others], alone[others], rtol=1e-5, atol=1e-4)

"""The native linear against its torch reference, over shapes that do and do not divide its tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels import jit
from shardwright.kernels.linear import MAX_TOKENS, is_available, linear_bf16, linear_bf16_reference


def test_the_kernel_compiles_here() -> None:
    assert is_available(), "a C++ compiler is part of the development set-up"


@settings(max_examples=80, deadline=None)
@given(tokens=st.integers(1, MAX_TOKENS), inner=st.integers(1, 200), outer=st.integers(1, 70), has_bias=st.booleans())
def test_equals_float32_accumulation_rounded_once(tokens: int, inner: int, outer: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens * 10000 + inner * 100 + outer)
    draw = [
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((tokens, inner), (outer, inner), (outer,))
    ]
    bias = draw[2] if has_bias else None
    actual, expected = linear_bf16(draw[0], draw[1], bias), linear_bf16_reference(draw[0], draw[1], bias)
    # The order of float32 sums may differ: at most one step of bfloat16 apart, and for cancelling sums float32 noise.
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=1e-4)


def test_infinity_and_not_a_number_pass_through() -> None:
    weight = torch.ones(1, 8, dtype=torch.bfloat16)
    inputs = torch.ones(3, 8, dtype=torch.bfloat16)
    inputs[0, 0], inputs[1, 0] = float("inf"), float("nan")
    output = linear_bf16(inputs, weight, None)
    assert output[0, 0] == float("inf")
    assert output[1, 0].isnan()
    assert output[2, 0] == 8


def test_more_tokens_than_the_kernel_takes_are_refused() -> None:
    weight = torch.ones(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no native linear for 17 tokens"):
        linear_bf16(torch.ones(MAX_TOKENS + 1, 8, dtype=torch.bfloat16), weight, None)


def test_without_a_compiler_there_is_one_warning_and_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    jit.native_library.cache_clear()
    try:
        assert not is_available()
        assert not is_available()
        assert [record.message for record in caplog.records] == [
            "no C++ compiler found: native kernels are off, some steps are slower; install g++ to have them"
        ]
    finally:
        jit.native_library.cache_clear()

"""The packed linear against its torch reference, over shapes that do and do not divide its tiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels import jit
from shardwright.kernels import packed_linear as kernel
from shardwright.kernels.packed_linear import (
    is_available,
    pack_weight,
    packed_elements,
    packed_linear,
    packed_linear_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_kernel_compiles_here() -> None:
    assert is_available(), "a C++ compiler is part of the development set-up"


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 40),
    inner=st.integers(0, 200),
    outer=st.integers(0, 70),
    weight_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    is_turned=st.booleans(),
)
def test_equals_float32_accumulation_rounded_once(
    tokens: int,
    inner: int,
    outer: int,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    has_bias: bool,
    is_turned: bool,
) -> None:
    generator = torch.Generator().manual_seed(tokens * 10000 + inner * 100 + outer)
    x = torch.randn(tokens, inner, generator=generator).to(dtype)
    weight = torch.randn(outer, inner, generator=generator).to(weight_dtype)
    weight = weight.T.contiguous().T if is_turned else weight
    bias = torch.randn(outer, generator=generator) if has_bias else None
    actual = packed_linear(x, pack_weight(weight), bias, outer)
    assert actual.dtype is dtype
    # The order of float32 sums may differ: at most one step of the type apart, and for cancelling sums float32 noise.
    torch.testing.assert_close(
        actual, packed_linear_reference(x, weight, bias), rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-4
    )


@pytest.mark.parametrize("tokens", [100, 500])
def test_more_tokens_than_stay_in_the_cache(tokens: int) -> None:
    weight, x = torch.randn(33, 1100), torch.randn(tokens, 1100)
    torch.testing.assert_close(packed_linear(x, pack_weight(weight), None, 33), x @ weight.T, rtol=1e-5, atol=2e-4)


def test_a_strided_input_is_taken_as_it_is_meant() -> None:
    weight, x = torch.randn(5, 8), torch.randn(8, 3).T
    torch.testing.assert_close(packed_linear(x, pack_weight(weight), None, 5), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_and_not_a_number_pass_through(dtype: torch.dtype) -> None:
    inputs = torch.ones(3, 8, dtype=dtype)
    inputs[0, 0], inputs[1, 0] = float("inf"), float("nan")
    output = packed_linear(inputs, pack_weight(torch.ones(1, 8, dtype=dtype)), None, 1)
    assert output[0, 0] == float("inf")
    assert output[1, 0].isnan()
    assert output[2, 0] == 8


def test_a_weight_of_another_shape_is_refused() -> None:
    packed = pack_weight(torch.ones(2, 8))
    assert len(packed) == packed_elements(2, 8)
    with pytest.raises(ValueError, match="no packed weight of 2 x 7 has"):
        packed_linear(torch.ones(1, 7), packed, None, 2)
    with pytest.raises(ValueError, match="its bias is not float32"):
        packed_linear(torch.ones(1, 8), packed, torch.ones(2, dtype=torch.bfloat16), 2)


def test_without_a_compiler_there_is_one_warning_and_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    jit._loaded.cache_clear()
    try:
        assert not is_available()
        assert not is_available()
        assert [record.message for record in caplog.records] == [
            "no C++ compiler found: native kernels are off, some steps are slower; install g++ to have them"
        ]
    finally:
        jit._loaded.cache_clear()


@pytest.fixture
def plain_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels are compiled for a processor of which nothing is known."""
    flags = tuple(flag for flag in jit.FLAGS if not flag.startswith("-march"))
    monkeypatch.setattr(jit, "FLAGS", flags)
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path))
    caches = (jit._loaded, kernel.panel_features)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("plain_processor")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(1, 5, 3), (4, 33, 20), (13, 64, 37)])
def test_other_processors_compute_the_same(dtype: torch.dtype, tokens: int, inner: int, outer: int) -> None:
    weight, x = torch.randn(outer, inner).to(dtype), torch.randn(tokens, inner).to(dtype)
    actual = packed_linear(x, pack_weight(weight), None, outer)
    expected = packed_linear_reference(x, weight, None)
    torch.testing.assert_close(actual, expected, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-4)


def test_shapes_are_known_without_computing() -> None:
    packed = pack_weight(torch.ones(37, 64)).to("meta")
    output = packed_linear(torch.ones(13, 64, device="meta"), packed, None, 37)
    assert (output.shape, output.device.type) == ((13, 37), "meta")

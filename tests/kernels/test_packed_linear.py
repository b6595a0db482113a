"""The packed linear against its torch reference, over shapes that do and do not divide its tiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels import jit
from shardwright.kernels import packed_linear as kernel
from shardwright.kernels.packed_linear import (
    compact_bytes,
    is_available,
    keep_unpacked,
    pack_weight,
    packed_elements,
    packed_linear,
    packed_linear_reference,
    panel_features,
    unpack_weight,
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


def trained(outer: int, inner: int) -> torch.Tensor:
    """A weight such as training makes: most numbers of a few magnitudes, some zero, some very small."""
    generator = torch.Generator().manual_seed(outer + inner)
    weight = torch.randn(outer, inner, generator=generator) * 0.02
    weight.view(-1)[:: max(outer * inner // 5, 1)] *= 1e-6
    weight.view(-1)[1 :: max(outer * inner // 7, 1)] = 0
    return weight.bfloat16()


def room_for(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for a weight in 12 bits, and beside it in 16."""
    size = compact_bytes(weight)
    assert size is not None
    start = size // 64 * 64 + 64
    memory = torch.zeros(start + 2 * packed_elements(*weight.shape), dtype=torch.uint8)
    return memory[:size], memory[start:].view(torch.bfloat16)


@settings(max_examples=100, deadline=None)
@given(
    outer=st.integers(1, 70),
    groups=st.integers(1, 90),
    spread=st.integers(0, 40),
    magnitude=st.integers(-130, 120),
    wild=st.integers(0, 3),
    is_turned=st.booleans(),
)
def test_a_weight_is_kept_bit_by_bit(
    outer: int, groups: int, spread: int, magnitude: int, wild: int, is_turned: bool
) -> None:
    generator = torch.Generator().manual_seed(outer * 1000 + groups)
    exponents = magnitude - torch.randint(0, spread + 1, (outer, 4 * groups), generator=generator)
    weight = torch.ldexp(torch.randn(outer, 4 * groups, generator=generator), exponents).bfloat16()
    if wild:  # any bits: numbers of all magnitudes, infinities and those that are none
        bits = torch.randint(-(2**15), 2**15, weight.shape, generator=generator, dtype=torch.int16)
        chosen = torch.rand(weight.shape, generator=generator) < 0.1**wild
        weight = torch.where(chosen, bits, weight.view(torch.int16)).view(torch.bfloat16)
    weight = weight.T.contiguous().T if is_turned else weight
    kept = unpack_weight(pack_weight(weight), *weight.shape)
    assert torch.equal(kept.view(torch.int16), weight.view(torch.int16))


def test_trained_weights_of_bfloat16_take_12_bits() -> None:
    weight = trained(640, 576)
    packed = pack_weight(weight)
    assert packed.dtype is torch.uint8
    assert packed.nbytes <= 0.79 * weight.nbytes
    whole = pack_weight(weight, torch.empty(packed_elements(640, 576), dtype=torch.bfloat16))
    assert whole.dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(640, 574), (16, 2)])
def test_what_has_no_groups_of_four_inputs_takes_16_bits(shape: tuple[int, int]) -> None:
    weight = trained(*shape)
    assert compact_bytes(weight) is None
    assert pack_weight(weight).dtype is torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_no_inputs_give_the_bias(tokens: int) -> None:
    weight, bias = torch.zeros(8, 0).bfloat16(), torch.randn(8)
    output = packed_linear(torch.zeros(tokens, 0), pack_weight(weight), bias, 8)
    assert torch.equal(output, bias.expand(tokens, 8))


@pytest.mark.parametrize("tokens", [5, 40, 150])
def test_a_weight_is_multiplied_while_it_is_unpacked(tokens: int) -> None:
    outer, inner = 2000, 2048
    weight, x = trained(outer, inner), torch.randn(tokens, inner)
    into, unpacked = room_for(weight)
    packed = pack_weight(weight, into)
    expected = packed_linear(x, packed, None, outer)
    torch.testing.assert_close(expected, packed_linear_reference(x, weight, None), rtol=1e-5, atol=1e-5)
    for _ in range(5):
        pack_weight(weight, into)
        thread = Thread(target=keep_unpacked, args=(packed, unpacked, outer, inner))
        thread.start()
        while thread.is_alive():
            assert torch.equal(packed_linear(x, packed, None, outer), expected)
        assert torch.equal(packed_linear(x, packed, None, outer), expected)


def test_a_weight_of_too_many_magnitudes_takes_16_bits() -> None:
    weight = torch.ldexp(torch.ones(64, 64), torch.arange(64)).bfloat16()
    size = compact_bytes(weight)
    assert size is not None
    unpacked = torch.empty(packed_elements(64, 64), dtype=torch.bfloat16)
    packed = pack_weight(weight, torch.empty(size, dtype=torch.uint8))
    assert packed.dtype is torch.bfloat16
    assert pack_weight(weight, torch.empty(size, dtype=torch.uint8), unpacked) is unpacked
    x = torch.ones(1, 64)
    torch.testing.assert_close(packed_linear(x, packed, None, 64), packed_linear_reference(x, weight, None))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 7, 12, 13, 40, 300])
@pytest.mark.parametrize(("outer", "inner"), [(37, 64), (48, 1028), (640, 576)])
def test_12_bits_give_what_16_give(tokens: int, outer: int, inner: int) -> None:
    weight, x = trained(outer, inner), torch.randn(tokens, inner)
    bias = torch.randn(outer)
    actual = packed_linear(x, pack_weight(weight), bias, outer)
    torch.testing.assert_close(actual, packed_linear_reference(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 13, 30])
def test_a_weight_may_be_kept_unpacked(tokens: int) -> None:
    outer, inner = 320, 2048
    weight, x = trained(outer, inner), torch.randn(tokens, inner)
    into, unpacked = room_for(weight)
    packed = pack_weight(weight, into)
    whole = pack_weight(weight, torch.empty_like(unpacked))
    expected = packed_linear(x, packed, None, outer)
    assert not unpacked.any(), "it was not said that it shall be"
    keep_unpacked(packed, unpacked, outer, inner)
    assert torch.equal(unpacked, whole)
    assert torch.equal(packed_linear(x, packed, None, outer), expected)
    unpacked.zero_()
    if tokens != 6:  # of which some machines read 12 bits and some 16
        assert packed_linear(x, packed, None, outer).any() == (tokens <= 4), "few tokens read 12 bits"
    keep_unpacked(packed, unpacked, outer, inner)
    x = torch.randn(500, inner)
    torch.testing.assert_close(
        packed_linear(x, packed, None, outer), packed_linear_reference(x, weight, None), rtol=1e-5, atol=1e-5
    )
    pack_weight(-weight, into)
    torch.testing.assert_close(packed_linear(x, packed, None, outer), packed_linear_reference(x, -weight, None))


def test_a_weight_of_another_shape_is_refused() -> None:
    packed = pack_weight(torch.ones(2, 8))
    assert len(packed) == packed_elements(2, 8)
    with pytest.raises(ValueError, match="no packed weight of 2 x 7 has"):
        packed_linear(torch.ones(1, 7), packed, None, 2)
    compact = pack_weight(trained(64, 64))
    with pytest.raises(ValueError, match="no packed weight of 64 x 60 has"):
        packed_linear(torch.ones(1, 60), compact, None, 64)
    with pytest.raises(ValueError, match="no packed weight of 64 x 62 has"):
        packed_linear(torch.ones(1, 62), compact, None, 64)
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


@pytest.fixture(scope="module")
def plain_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture
def plain_processor(monkeypatch: pytest.MonkeyPatch, plain_cache: Path) -> Iterator[None]:
    """Kernels are compiled for a processor of which nothing is known."""
    flags = tuple(flag for flag in jit.FLAGS if not flag.startswith("-march"))
    monkeypatch.setattr(jit, "FLAGS", flags)
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(plain_cache))
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


@pytest.mark.usefixtures("plain_processor")
def test_other_processors_keep_12_bits_too() -> None:
    weight = trained(100, 1028)
    packed = pack_weight(weight)
    assert (packed.dtype, panel_features()) == (torch.uint8, 8)
    assert torch.equal(unpack_weight(packed, 100, 1028), weight)
    for tokens in (1, 2, 3, 20):
        x = torch.randn(tokens, 1028)
        expected = packed_linear_reference(x, weight, None)
        torch.testing.assert_close(packed_linear(x, packed, None, 100), expected, rtol=1e-5, atol=1e-5)


def test_shapes_are_known_without_computing() -> None:
    packed = pack_weight(torch.ones(37, 64)).to("meta")
    output = packed_linear(torch.ones(13, 64, device="meta"), packed, None, 37)
    assert (output.shape, output.device.type) == ((13, 37), "meta")

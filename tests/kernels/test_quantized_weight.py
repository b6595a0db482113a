"""Matrices as codes: close to what they were, and the same whether cut before or after."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.kernels.quantized_weight import dequantize, quantize
from shardwright.weight_format import WeightFormat

FORMATS = st.builds(WeightFormat, st.sampled_from([8, 4]), st.integers(1, 70))


def matrix(outputs: int, inputs: int, *, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    return torch.randn(outputs, inputs, generator=generator) + shift


@settings(max_examples=100, deadline=None)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 150), format=FORMATS, shift=st.sampled_from([0.0, 3.0, -0.5]))
def test_no_value_is_off_by_more_than_half_a_step_and_the_rounding_of_scales(
    outputs: int, inputs: int, format: WeightFormat, shift: float
) -> None:
    weight = matrix(outputs, inputs, shift=shift)
    found = quantize(weight, format)
    assert found.scales.shape == (outputs, format.num_groups(inputs))
    assert found.codes.shape[1] == format.code_bytes(inputs)
    assert found.num_bytes == format.num_bytes(outputs, inputs)
    actual = dequantize(found)
    assert actual.shape == weight.shape
    for first in range(0, inputs, format.group_size):
        group, values = weight[:, first : first + format.group_size], actual[:, first : first + format.group_size]
        spread = group.amax(1) - group.amin(1) if format.bits == 4 else 2 * group.abs().amax(1)
        step = spread / (15 if format.bits == 4 else 254)
        rounding = group.abs().amax(1) * 2**-8  # of scale and minimum to bfloat16
        assert ((values - group).abs().amax(1) <= step / 2 + rounding + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(st.integers(1, 4), min_size=2, max_size=4), format=FORMATS, rest=st.integers(0, 69))
def test_a_part_between_groups_has_the_codes_of_the_whole(groups: list[int], format: WeightFormat, rest: int) -> None:
    inputs = sum(groups) * format.group_size + rest % format.group_size
    weight = matrix(5, inputs)
    whole = dequantize(quantize(weight, format))
    ends = [sum(groups[: i + 1]) * format.group_size for i in range(len(groups) - 1)]
    parts = weight.tensor_split(ends, dim=1)
    again = torch.cat([dequantize(quantize(part, format)) for part in parts], dim=1)
    assert torch.equal(again, whole)
    assert torch.equal(dequantize(quantize(weight[1:4], format)), whole[1:4])


@given(first=st.integers(0, 6), rows=st.integers(0, 6), bits=st.sampled_from([8, 4]))
def test_rows_are_those_of_the_whole(first: int, rows: int, bits: int) -> None:
    found = quantize(matrix(6, 40), WeightFormat(bits, 16))
    assert torch.equal(dequantize(found, first, first + rows), dequantize(found)[first : first + rows])


def test_what_codes_can_say_is_kept_exactly() -> None:
    steps = torch.arange(-7.0, 9.0).repeat(4, 2) * 0.5
    assert torch.equal(dequantize(quantize(steps, WeightFormat(4, 32))), steps)
    assert torch.equal(dequantize(quantize(steps - 0.5, WeightFormat(4, 16))), steps - 0.5)
    whole_numbers = torch.arange(-127.0, 128.0)[None]
    assert torch.equal(dequantize(quantize(whole_numbers, WeightFormat(8, 255))), whole_numbers)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_groups_of_one_value_keep_it(bits: int, value: float) -> None:
    weight = torch.full((3, 40), value)
    torch.testing.assert_close(dequantize(quantize(weight, WeightFormat(bits, 32))), weight, rtol=2**-8, atol=0)

"""Linears with quantized weights: in place, whatever stands in front of them, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from shardwright.errors import UnsupportedModelError
from shardwright.kernels.packed_codes import PackedCodes
from shardwright.kernels.quantized_weight import dequantize
from shardwright.layers.cpu_linears import replace_linears
from shardwright.layers.parallel import become
from shardwright.layers.parallel_module import DividedInput, SummedOutput
from shardwright.layers.quantized_linear import (
    Quantized,
    QuantizedLinear,
    input_dim,
    quantizable_linears,
    quantize_linears,
)
from shardwright.loading.load import weight_bytes
from shardwright.weight_format import WeightFormat

INT8 = WeightFormat(8, 32)
INT4 = WeightFormat(4, 16)


def quantize_all(module: nn.Module, format: WeightFormat) -> None:
    quantize_linears(module, quantizable_linears(module), format)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    format=st.sampled_from([INT8, INT4, WeightFormat(4, 64), WeightFormat(8, 5)]),
)
def test_multiplies_with_the_matrix_that_codes_stand_for(
    tokens: int, inputs: int, outputs: int, has_bias: bool, dtype: torch.dtype, format: WeightFormat
) -> None:
    module = nn.Sequential(nn.Linear(inputs, outputs, bias=has_bias)).to(dtype).requires_grad_(False)
    quantize_all(module, format)
    linear: Any = module[0]
    x = torch.linspace(-2, 2, tokens * inputs).view(tokens, inputs).to(dtype)
    bias = linear.bias.float() if has_bias else None
    expected = F.linear(x.float(), dequantize(linear.quantized_weight), bias)
    actual = module(x)
    assert actual.dtype is dtype
    tolerance = 1e-4 if dtype is torch.float32 else 2**-6
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def test_leading_dimensions_are_kept() -> None:
    module = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    quantize_all(module, INT8)
    assert module(torch.ones(2, 3, 6)).shape == (2, 3, 4)


@pytest.mark.parametrize("format", [INT8, INT4])
def test_the_module_holds_codes_and_no_matrix(format: WeightFormat) -> None:
    module = nn.Sequential(nn.Linear(48, 20, bias=False), nn.Linear(20, 7)).requires_grad_(False)
    quantize_all(module, format)
    assert [type(linear) for linear in module] == [QuantizedLinear] * 2
    assert [name for name, _ in module.named_parameters()] == ["1.bias"]
    assert weight_bytes(module) == format.num_bytes(20, 48) + format.num_bytes(7, 20) + 7 * 4


def test_types_stay_when_the_module_is_moved_or_cast() -> None:
    module = nn.Sequential(nn.Linear(48, 20)).requires_grad_(False)
    quantize_all(module, INT4)
    linear: Any = module[0]
    before = linear.quantized_weight
    assert module.to("cpu", torch.float16) is module
    assert linear.bias.dtype is torch.float16
    assert [part.dtype for part in linear.quantized_weight[:3]] == [part.dtype for part in before[:3]]
    assert module.to("meta")[0].quantized_weight.scales.is_meta


def test_code_that_reads_a_weight_gets_the_matrix() -> None:
    linear: Any = nn.Linear(40, 8).bfloat16().requires_grad_(False)
    before = linear.weight
    quantize_all(nn.Sequential(linear), INT8)
    assert linear.weight.dtype is torch.bfloat16
    assert (linear.weight - before).abs().max() < 0.01
    assert torch.equal(linear.weight, dequantize(linear.quantized_weight).bfloat16())


def test_weights_that_lie_inputs_first() -> None:
    conv: Any = Conv1D(12, 40)
    conv.requires_grad_(False).weight.mul_(20)
    before, x = conv.weight, torch.randn(3, 40)
    expected = conv(x)
    module = nn.Sequential(conv)
    assert quantizable_linears(module) == {"0.weight": 0}
    quantize_all(module, INT8)
    assert conv.weight.shape == before.shape == (40, 12)
    torch.testing.assert_close(module(x), expected, rtol=0.02, atol=0.05)
    assert isinstance(conv, Conv1D)


class Collectives:
    """Adds up with another rank that has the same."""

    rank, size = 0, 2

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 12), lambda: Conv1D(12, 40)])
def test_what_stands_in_front_of_a_linear_stays_there(make: Any) -> None:
    alone, summed = make().requires_grad_(False), make().requires_grad_(False)
    summed.load_state_dict(alone.state_dict())
    module = nn.ModuleDict({"alone": alone, "summed": summed})
    weights = quantizable_linears(module)
    become(summed, SummedOutput, collectives=Collectives())  # type: ignore[arg-type]
    become(summed, DividedInput, collectives=Collectives())  # type: ignore[arg-type]
    quantize_linears(module, weights, INT4)
    assert all(isinstance(held, Quantized) for held in module.values())
    assert isinstance(summed, SummedOutput)
    x = torch.randn(3, 40)
    assert torch.equal(summed(x), 2 * alone(x / 2))


def test_shared_weights_embeddings_and_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        """Does something else in its forward, for all we know."""

    embedding, head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
    head.weight = embedding.weight
    module = nn.ModuleDict({"embedding": embedding, "own": Own(8, 8), "head": head})
    with pytest.raises(UnsupportedModelError, match="ModuleDict has no linear whose weight can be quantized"):
        quantizable_linears(module)
    module["plain"] = plain = nn.Linear(8, 8)
    module["again"] = plain  # one module under two names
    assert quantizable_linears(module) == {"plain.weight": 1, "again.weight": 1}
    quantize_all(module, INT8)
    assert isinstance(plain, QuantizedLinear)
    assert type(head) is nn.Linear
    assert input_dim(embedding) is None


def test_weights_that_are_on_other_ranks_are_left_empty() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weights = quantizable_linears(module)
    module[1].weight = nn.Parameter(torch.empty(0))
    quantize_linears(module, weights, INT8)
    assert isinstance(module[0], QuantizedLinear)
    assert type(module[1]) is nn.Linear


@pytest.mark.parametrize("format", [INT8, INT4, WeightFormat(4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_codes_give_the_same(format: WeightFormat, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(48, 20), nn.Linear(20, 7, bias=False)).to(dtype).requires_grad_(False)
    quantize_all(module, format)
    x = torch.linspace(-2, 2, 5 * 48).view(1, 5, 48).to(dtype)
    expected, weight, size = module(x), module[0].weight, weight_bytes(module)
    replace_linears(module)
    assert all(isinstance(linear.quantized_weight, PackedCodes) for linear in module)
    tolerance = 2**-14 if dtype is torch.float32 else 2**-6  # packed, inputs are rounded to 16 bits, or to 8
    torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(module[0].weight, weight)
    assert weight_bytes(module) < 3 * size  # panels are filled up
    assert module.to("meta")[0].quantized_weight.scales.is_meta

"""Gated modules are found by what they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, Phi3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from shardwright.kernels.gated import Activation
from shardwright.layers.gated import FoundGated, as_gated

SIZES = {"hidden_size": 32, "intermediate_size": 48}


class Custom(nn.Module):
    """Three linears and what a function makes of them; all of one size, so that only numbers tell them apart."""

    def __init__(self, function: Callable[[Tensor, Callable[[str, Tensor], Tensor]], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.dropout = nn.Dropout()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.function(x, lambda name, value: getattr(self, name)(value)))


class Halves(nn.Module):
    """Values before the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = self.wide(x).chunk(2, -1)
        return self.out(values * F.gelu(gate))


def gate_in_place(x: Tensor, call: Callable[[str, Tensor], Tensor]) -> Tensor:
    x.mul_(2)
    return call("c", F.silu(call("a", x)) * call("b", x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: LlamaMLP(LlamaConfig(**SIZES)), FoundGated(Activation.SILU, "gate_proj", "up_proj", "down_proj")),
        (
            lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
            FoundGated(Activation.SILU, "gate_proj", "up_proj", "down_proj"),
        ),
        (
            lambda: GemmaMLP(GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh")),
            FoundGated(Activation.GELU_TANH, "gate_proj", "up_proj", "down_proj"),
        ),
        (lambda: Phi3MLP(Phi3Config(**SIZES)), FoundGated(Activation.SILU, "gate_up_proj", None, "down_proj")),
        (Halves, FoundGated(Activation.GELU, "wide", None, "out", is_gate_first=False)),
        (
            lambda: Custom(lambda x, call: call("b", call("a", x) * F.relu(call("c", x)))),
            FoundGated(Activation.RELU, "c", "a", "b"),
        ),
        (
            lambda: Custom(lambda x, call: call("c", call("a", x) * call("b", x).sigmoid())),
            FoundGated(Activation.SIGMOID, "b", "a", "c"),
        ),
    ],
)
def test_gated_modules_are_recognized(make: Callable[[], nn.Module], found: FoundGated, dtype: torch.dtype) -> None:
    module = make().to(dtype)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    assert as_gated(module) == found
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, call: call("c", call("a", x) * call("b", x)),
        lambda x, call: call("c", F.silu(call("a", x)) * call("b", x) * 1.01),
        lambda x, call: call("c", F.silu(call("a", x)) * call("b", x)) + x,
        lambda x, call: call("c", F.silu(call("a", x)) + call("b", x)),
        lambda x, call: call("c", F.silu(call("a", x)) * call("b", x[..., :1].expand_as(x))),
        lambda x, call: call("c", F.silu(call("a", x).clamp(max=2)) * call("b", x)),
        lambda x, call: call("c", F.silu(call("a", x)).view(-1, 16) * call("b", x).view(-1, 16)),
        gate_in_place,
    ],
)
def test_what_does_something_else_is_none(function: Callable[..., Tensor]) -> None:
    assert as_gated(Custom(function)) is None


def test_code_that_rounds_elsewhere_keeps_doing_so() -> None:
    module = Custom(lambda x, call: call("c", call("a", x) * torch.sigmoid(call("a", x)) * call("b", x)))
    assert as_gated(module) is not None
    assert as_gated(module.bfloat16()) is None


def test_modules_with_other_parameters_are_none() -> None:
    module = LlamaMLP(LlamaConfig(**SIZES))
    module.scale = nn.Parameter(torch.ones(1))
    assert as_gated(module) is None
    assert as_gated(nn.Sequential(nn.Linear(4, 4))) is None

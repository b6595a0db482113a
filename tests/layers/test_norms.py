"""Norms are found by what they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from shardwright.kernels.norm import NormKind
from shardwright.layers.norms import as_norm

SIZE = 48


class Custom(nn.Module):
    """Whatever a function does with rows and one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], size: int = SIZE) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def in_place(x: Tensor, weight: Tensor) -> Tensor:
    return x.copy_(rms(x) * weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: LlamaRMSNorm(SIZE, eps=1e-5), NormKind(False, 1e-5, 0, True)),
        (lambda: Gemma2RMSNorm(SIZE, eps=1e-6), NormKind(False, 1e-6, 1, False)),
        (lambda: nn.LayerNorm(SIZE, eps=3e-6), NormKind(True, 3e-6, 0, False)),
        (lambda: nn.LayerNorm(SIZE, bias=False), NormKind(True, 1e-5, 0, False)),
        (lambda: nn.RMSNorm(SIZE, eps=1e-8), NormKind(False, 1e-8, 0, False)),
        (lambda: Custom(lambda x, w: F.rms_norm(x.float(), (SIZE,), w.float() + 0.5).to(x.dtype)), None),
    ],
)
def test_norms_are_recognized(make: Callable[[], nn.Module], kind: NormKind | None, dtype: torch.dtype) -> None:
    found = as_norm(make().to(dtype))
    assert found is not None
    if kind is None:  # the default epsilon is that of the type
        kind = NormKind(False, found.kind.epsilon, 0.5, False)
        assert found.kind.epsilon == pytest.approx(torch.finfo(torch.float32).eps, rel=0.01)
    if dtype is torch.float32:
        kind = NormKind(kind.is_centered, kind.epsilon, kind.offset, False)
    assert found.kind == kind
    assert (found.bias is None) == (dict(make().named_parameters()).get("bias") is None)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(SIZE),
        nn.GroupNorm(4, SIZE),
        nn.PReLU(SIZE),
        nn.Linear(SIZE, 1),
        nn.Sequential(nn.LayerNorm(SIZE)),
        Custom(lambda x, w: x * w),
        Custom(lambda x, w: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2) * w),
        Custom(lambda x, w: rms(x) * w.square()),
        Custom(lambda x, w: rms(x) * w.flip(0)),
        Custom(lambda x, w: rms(x) * w * (len(x) < 3)),
        Custom(lambda x, w: F.normalize(x, dim=0) * w),
        Custom(in_place),
        Custom(lambda x, w: (rms(x) * w).double()),
        Custom(lambda x, w: rms(x) * w[:-1]),
        Custom(lambda x, w: x.new_zeros(())),
    ],
)
def test_what_does_something_else_is_none(module: nn.Module) -> None:
    assert as_norm(module) is None


def test_code_that_computes_in_bfloat16_keeps_doing_so() -> None:
    module = Custom(lambda x, w: rms(x) * w, size=512)
    assert as_norm(module) is not None
    assert as_norm(module.bfloat16()) is None


def test_the_module_stays_as_it_is() -> None:
    module = T5LayerNorm(SIZE)
    nn.init.normal_(module.weight)
    before = module.weight.clone()
    assert as_norm(module) is not None
    assert torch.equal(module.weight, before)
    assert module.weight.requires_grad

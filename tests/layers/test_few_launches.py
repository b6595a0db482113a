"""Models with modules that take one launch give what they gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardwright.layers.few_launches import FewLaunches

TOKENS = torch.tensor([[5, 9, 17]])
NORMS = [
    *(f"model.layers.{i}.{name}" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")),
    "model.norm",
]
GATED = [f"model.layers.{i}.mlp" for i in range(2)]


@torch.no_grad()
def test_a_model_is_the_same_until_it_is_undone(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 2)
    expected = model(TOKENS).logits
    found = FewLaunches(model)
    assert (found.norms, found.gated) == (NORMS, GATED)
    assert torch.equal(model(TOKENS).logits, expected)
    undo = found.apply()
    assert all("forward" in vars(model.get_submodule(name)) for name in NORMS + GATED)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(TOKENS).logits, expected)


class GatedNorm(nn.LayerNorm):
    """Takes something else beside the rows."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = super().forward(x)
        return normed if gate is None else normed * gate


@torch.no_grad()
def test_what_was_not_looked_at_runs_the_code() -> None:
    module = nn.ModuleList([GatedNorm(8)])
    gated = module[0]
    rows, gate = torch.randn(3, 8), torch.randn(3, 8)
    expected = gated(rows, gate), gated(rows, gate=gate), gated(rows)
    assert FewLaunches(module).norms == ["0"]
    FewLaunches(module).apply()
    assert torch.equal(gated(rows, gate), expected[0])
    assert torch.equal(gated(rows, gate=gate), expected[1])
    torch.testing.assert_close(gated(rows), expected[2])
    assert gated(rows.double().to(torch.float32)[None]).shape == (1, 3, 8)


def test_modules_with_hooks_are_left_alone() -> None:
    module = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)])
    module[0].register_forward_hook(lambda *_: None)
    module[1].register_forward_pre_hook(lambda *_: None)
    assert FewLaunches(module).norms == ["2"]
    FewLaunches(module).apply()
    assert FewLaunches(module).norms == []


class Gated(nn.Module):
    """One product of one linear."""

    def __init__(self, *, is_one: bool, bias: bool) -> None:
        super().__init__()
        self.is_one = is_one
        self.wide = nn.Linear(8, 24 if is_one else 12, bias=bias)
        self.other = nn.Linear(8, 12, bias=bias) if not is_one else nn.Identity()
        self.out = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, gate = self.wide(x).chunk(2, -1) if self.is_one else (self.other(x), self.wide(x))
        return self.out(torch.relu(gate) * values)


@pytest.mark.parametrize("is_one", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_both_sides_of_a_gate_are_one_product(is_one: bool, bias: bool) -> None:
    model = nn.ModuleList([Gated(is_one=is_one, bias=bias)])
    module, rows = model[0], torch.randn(2, 3, 8)
    expected, before = module(rows), {name: value.clone() for name, value in model.named_parameters()}
    found = FewLaunches(model)
    assert found.gated == ["0"]
    undo = found.apply()
    torch.testing.assert_close(module(rows), expected)
    assert module(rows[:0]).shape == (0, 3, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    if not is_one:
        assert module.other.weight.data_ptr() == module.wide.weight.data_ptr() + module.wide.weight.nbytes
        module.other.weight.zero_()  # it is the one that is multiplied with
        if not bias:
            assert torch.equal(module(rows), module.out(torch.zeros(2, 3, 12)))
    undo()
    assert "forward" not in vars(module)


def test_modules_that_others_compute_are_left_alone() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleList([Gated(is_one=True, bias=False), nn.LayerNorm(8)]), "ab": nn.LayerNorm(8)}
    )
    found = FewLaunches(model, without=["a"])
    assert (found.norms, found.gated) == (["ab"], [])

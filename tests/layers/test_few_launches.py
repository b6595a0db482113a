"""Models with modules that take one launch give what they gave."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardwright.layers.few_launches import FewLaunches

TOKENS = torch.tensor([[5, 9, 17]])
NORMS = [
    *(f"model.layers.{i}.{name}" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")),
    "model.norm",
]


@torch.no_grad()
def test_a_model_is_the_same_until_it_is_undone(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 2)
    expected = model(TOKENS).logits
    found = FewLaunches(model)
    assert found.norms == NORMS
    assert torch.equal(model(TOKENS).logits, expected)
    undo = found.apply()
    assert all("forward" in vars(model.get_submodule(name)) for name in NORMS)
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

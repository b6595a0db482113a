"""What llama.cpp is given is the model: Transformers, which reads GGUF files too, finds the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def read(file: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()


def original(model: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()


def test_weights_come_back_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    import to_gguf

    to_gguf.main([str(tiny_llama), str(tmp_path / "model.gguf"), "--type", "f32"])
    found, expected = read(tmp_path / "model.gguf"), original(tiny_llama)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_quantized_weights_are_near_and_norms_exact(tiny_llama: Path, tmp_path: Path) -> None:
    import to_gguf

    to_gguf.main([str(tiny_llama), str(tmp_path / "model.gguf"), "--type", "q8_0"])
    found, expected = read(tmp_path / "model.gguf"), original(tiny_llama)
    for name, weight in expected.items():
        if weight.dim() == 1:
            assert torch.equal(found[name], weight)
        else:
            error = (found[name] - weight).abs().max() / weight.abs().max()
            assert 0 < error < 1 / 127


def test_what_is_no_plain_llama_is_refused() -> None:
    import to_gguf

    with pytest.raises(SystemExit, match="only llama"):
        to_gguf.check(SimpleNamespace(model_type="qwen3", rope_parameters=None))
    with pytest.raises(SystemExit, match="no tensor of a plain Llama"):
        to_gguf.gguf_name("model.layers.0.self_attn.q_norm.weight")

"""Tables that constructors compute are in no checkpoint: they come out as the code makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.loading.checkpoints import assert_same_state, load
from tests.models.custom_models import make_tale, write_tale
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def test_tables_of_custom_code_are_those_of_its_constructor(tmp_path: Path) -> None:
    """Transformers' own from_pretrained leaves such tables uninitialised."""
    assert_same_state(load(write_tale(tmp_path / "tale")), make_tale())


def test_tables_are_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    assert_same_state(load(write_tale(tmp_path / "tale"), torch.bfloat16), make_tale().bfloat16())


def test_persistent_buffers_come_from_the_checkpoint(tmp_path: Path) -> None:
    path = write_tale(tmp_path / "tale")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"mood": torch.arange(64).float()}, path / "model.safetensors", metadata={"format": "pt"})
    assert load(path).mood.tolist() == list(range(64))


def test_persistent_buffer_that_is_missing_keeps_its_computed_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tale(tmp_path / "tale")
    tensors = load_file(path / "model.safetensors")
    del tensors["mood"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert_same_state(load(path), make_tale())
    assert "mood" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "gemma3_text", "xglm", "nemotron"])
def test_tables_of_transformers_models(tmp_path: Path, model_type: str) -> None:
    """Rotary frequencies (also several sets), masks, and sinusoidal positions."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0,
        n_embd=64, n_head=4, n_layer=2, rotary_dim=8, d_model=64, num_layers=2, attention_heads=4, ffn_dim=96,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_state(load(tmp_path, dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))

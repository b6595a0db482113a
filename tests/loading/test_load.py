"""Weights arrive as Transformers would load them, from one file or many, in the types asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.loading.checkpoints import Tensors, assert_same_state, copy_of, load, shard
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardwright.loading.checkpoint import checkpoint_dtype, open_checkpoint
from shardwright.loading.load import weight_bytes


def from_pretrained(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_file_equals_from_pretrained(tiny_llama: Path, dtype: torch.dtype) -> None:
    assert_same_state(load(tiny_llama, dtype), from_pretrained(tiny_llama, dtype))


def test_shards_equal_the_single_file(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    files = shard(directory)
    assert len(set(files.values())) == 3
    assert_same_state(load(directory), load(tiny_llama))


def test_other_safetensors_files_beside_an_index_are_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    shard(directory)
    (directory / "optimizer.safetensors").write_bytes(b"not for us")
    with open_checkpoint(directory) as slices:
        assert "model.embed_tokens.weight" in slices


def untie(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def test_tied_head_shares_the_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model", untie, tie_word_embeddings=True)
    model = load(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_state(model, from_pretrained(directory))
    assert weight_bytes(model) == weight_bytes(load(tiny_llama)) - 128 * 64 * 4


def test_tied_head_may_lie_in_the_checkpoint_too(tiny_llama: Path, tmp_path: Path) -> None:
    def tie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load(copy_of(tiny_llama, tmp_path / "model", tie, tie_word_embeddings=True))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("model_type", "dtype", "kept"),
    [("gpt_oss", torch.float16, "input_layernorm.weight"), ("ernie4_5_moe", torch.bfloat16, "mlp.gate.weight")],
)
def test_weights_that_the_model_keeps_in_float32_stay(
    tmp_path: Path, model_type: str, dtype: torch.dtype, kept: str
) -> None:
    config = CONFIG_MAPPING[model_type](
        vocab_size=128, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2, moe_num_experts=2,
        num_experts_per_tok=1, moe_k=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, dtype)
    types = {parameter.dtype for name, parameter in model.named_parameters() if name.endswith(kept)}
    assert types == {torch.float32}
    assert_same_state(model, from_pretrained(tmp_path, dtype))


def test_text_part_of_a_larger_checkpoint(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["qwen3_5"](
        text_config={
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 16,
            "out_hidden_size": 64,
        },
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    assert_same_state(load(tmp_path, is_part=True), from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_of_the_checkpoint_is_found(tiny_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    assert checkpoint_dtype(copy_of(tiny_llama, tmp_path / "model", cast)) is dtype

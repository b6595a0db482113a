"""Tiny random models that read texts, as directories; every one has the byte-level tokenizer of tests/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.conftest import VOCAB_SIZE, build_tokenizer
from transformers import (
    BertConfig,
    GteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def bert_config(**options: Any) -> BertConfig:
    return BertConfig(**SIZES | {"max_position_embeddings": 64} | options)


def roberta_config(**options: Any) -> RobertaConfig:
    return RobertaConfig(**SIZES | {"max_position_embeddings": 64, "pad_token_id": 1, "type_vocab_size": 1} | options)


def llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"max_position_embeddings": 64, "num_key_value_heads": 2} | options)


def gte_config(**options: Any) -> GteConfig:
    return GteConfig(**SIZES | {"max_position_embeddings": 64} | options)


def t5_config(**options: Any) -> T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5Config(**sizes | {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "eos_token_id": 2} | options)


def save(kind: type[PreTrainedModel], config: PretrainedConfig, directory: Path) -> PreTrainedModel:
    """Write a random model with its tokenizer. Returns: the model, as an oracle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return model


def write_sentence_files(
    directory: Path, *, pooling: dict[str, Any], then: tuple[str, ...] = (), options: dict[str, Any] | None = None
) -> None:
    """What sentence-transformers writes beside a model.

    Args:
        directory: of the model.
        pooling: config of the pooling module.
        then: modules after it; "Dense" maps 32 numbers to 8.
        options: of config_sentence_transformers.json.
    """
    kinds = ["Transformer", "Pooling", *then]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(options or {}))
    for module in modules[1:]:
        (directory / module["path"]).mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if "Dense" in then:
        dense = directory / f"{kinds.index('Dense')}_Dense"
        config = {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
        (dense / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(1)
        weights = {
            "linear.weight": torch.randn(8, 32, generator=generator),
            "linear.bias": torch.randn(8, generator=generator),
        }
        save_file(weights, dense / "model.safetensors")

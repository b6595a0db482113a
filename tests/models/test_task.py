"""What a model is for, from its config and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig, T5Config

from shardwright.models.task import resolve_task


def config(kind: type[PretrainedConfig], *architectures: str, **options: Any) -> PretrainedConfig:
    made = kind(**options)
    made.architectures = list(architectures) or None
    return made


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (config(LlamaConfig, "LlamaForCausalLM"), "generate"),
        (config(LlamaConfig), "generate"),
        (config(LlamaConfig, "LlamaModel"), "embed"),
        (config(LlamaConfig, "LlamaForSequenceClassification"), "classify"),
        (config(BertConfig, "BertModel"), "embed"),
        (config(BertConfig, "BertForMaskedLM"), "embed"),
        (config(BertConfig, "BertForPreTraining"), "embed"),
        (config(BertConfig, "BertLMHeadModel"), "generate"),
        (config(BertConfig, "BertForSequenceClassification"), "classify"),
        (config(T5Config, "T5EncoderModel"), "embed"),
        (config(T5Config, "T5ForConditionalGeneration"), "generate"),
        (config(LlamaConfig, "Own", auto_map={"AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"}), "generate"),
        (config(LlamaConfig, "Own", auto_map={"AutoModel": "own.Own"}), "embed"),
        (config(LlamaConfig, "Judge", auto_map={"AutoModelForSequenceClassification": "own.Judge"}), "classify"),
    ],
)
def test_the_config_decides(model: PretrainedConfig, expected: str, tmp_path: Path) -> None:
    assert resolve_task("auto", model, tmp_path) == expected


def test_files_of_sentence_transformers_mean_embedding(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert resolve_task("auto", config(LlamaConfig, "LlamaForCausalLM"), tmp_path) == "embed"
    assert resolve_task("auto", config(BertConfig, "BertForSequenceClassification"), tmp_path) == "classify"


def test_the_user_decides_first(tmp_path: Path) -> None:
    assert resolve_task("embed", config(LlamaConfig, "LlamaForCausalLM"), tmp_path) == "embed"

"""Smaller models for proofs keep what decides how a model is cut."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardwright.errors import PlanError
from shardwright.plans.plan import plan_of
from shardwright.plans.prove import prove_plan
from shardwright.plans.prove.shrink import LARGE, shrink
from shardwright.plans.resolve import resolve
from shardwright.plans.units import unit_groups

LARGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064,
    },
    "gemma3_text": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128,
    },
    "deepseek_v3": {},
    "mixtral": {},
    "gpt_oss": {},
    "qwen3_moe": {"num_hidden_layers": 48, "num_experts": 128},
    "falcon": {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
               "new_decoder_architecture": True},
    "opt": {"hidden_size": 9216, "ffn_dim": 36864, "num_hidden_layers": 64, "num_attention_heads": 72,
            "word_embed_proj_dim": 9216},
}  # fmt: skip


def large_model(model_type: str, **fields: Any) -> PreTrainedModel:
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**(LARGE_MODELS.get(model_type, {}) | fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def heads_of(config: PretrainedConfig) -> list[Any]:
    names = ("num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head")
    return [getattr(config, name, None) for name in names]


@pytest.mark.parametrize("model_type", LARGE_MODELS)
def test_structure_and_heads_stay(model_type: str) -> None:
    large = large_model(model_type)
    before = large.config.to_dict()
    small = shrink(large, tp=2, pp=2)
    assert small.module is not large
    assert large.config.to_dict() == before
    assert sum(p.numel() for p in small.module.parameters()) <= LARGE / 2
    config: Any = small.module.config
    assert heads_of(config) == heads_of(large.config)
    assert config.num_hidden_layers >= 2
    assert "smaller model of the same structure" in small.notes[0]
    assert any("layers" in note for note in small.notes)
    assert plan_of(small.module).tp == plan_of(large).tp
    kinds = {type(m).__name__ for m in large.modules()}
    assert {type(m).__name__ for m in small.module.modules()} == kinds


@pytest.mark.parametrize("tp", [2, 3, 5])
def test_what_divides_by_the_ranks_still_does_and_the_rest_still_does_not(tp: int) -> None:
    large = large_model("llama", vocab_size=128257, intermediate_size=28160, num_hidden_layers=3)
    small = shrink(large, tp=tp, pp=1).module
    tables = [resolve(m, plan_of(m), unit_groups(m, plan_of(m)), tp=tp) for m in (large, small)]
    for row in tables[1].parameters:
        whole = tables[0].by_name[row.name]
        assert row.style == whole.style
        is_even, was_even = (len(set(r.pieces(tp))) == 1 for r in (row, whole))
        assert is_even <= was_even, row.name
        assert is_even == was_even or "mlp" in row.name, row.name  # features go in larger units where there are more


def test_every_kind_of_layer_stays() -> None:
    deepseek: Any = shrink(large_model("deepseek_v3"), tp=2, pp=1).module.config
    assert deepseek.num_hidden_layers == deepseek.first_k_dense_replace + 1
    assert deepseek.n_routed_experts >= 2 * deepseek.num_experts_per_tok
    gemma: Any = shrink(large_model("gemma3_text"), tp=2, pp=1).module.config
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}


def test_there_are_layers_for_every_stage_and_every_numbered_entry() -> None:
    def count(**options: Any) -> int:
        config: Any = shrink(large_model("llama"), **options).module.config
        return int(config.num_hidden_layers)

    assert count(tp=1, pp=5) == 5
    assert count(tp=2, pp=1, names=("model.layers.6.mlp.up_proj",)) == 7
    assert count(tp=2, pp=2, keep_layers=True) == 80


def test_small_models_stay_as_they_are() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=512, num_hidden_layers=4, vocab_size=3000))
    assert shrink(model, tp=2, pp=1).module is model
    assert shrink(model, tp=2, pp=1).notes == ()


def test_plain_modules_of_any_size_are_not_made_smaller() -> None:
    with torch.device("meta"):
        large, huge = nn.Linear(20_000, 20_000), nn.Linear(60_000, 60_000)
    found = shrink(large, tp=2, pp=1)
    assert found.module is large
    assert "full size" in found.notes[0]
    with pytest.raises(PlanError, match=r"3,600,060,000 parameters, too many for a proof in one process"):
        shrink(huge, tp=2, pp=1)


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 2)])
def test_a_plan_for_seventy_billion_parameters_is_proved_in_seconds(tp: int, pp: int) -> None:
    start = time.monotonic()
    report = prove_plan(large_model("llama"), tp=tp, pp=pp)
    assert report.ok
    assert "70,553,706,496" in report.notes[0]
    assert report.modules_compared >= 30
    assert time.monotonic() - start < 60

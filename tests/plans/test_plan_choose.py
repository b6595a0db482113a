"""Which of several plans counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.plans.semantic import PP, TP, semantic_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from shardwright.errors import PlanError
from shardwright.plans.choose import choose_plan, is_plan_of_layers
from shardwright.plans.plan import plan_of


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_the_models_own_plan_counts_where_nothing_else_is_given() -> None:
    plan = choose_plan(semantic_model(), tp=2, pp=2)
    assert plan.tp == TP
    assert list(plan.pp) == list(PP)
    assert plan.no_split == {"PreLNLayer"}
    assert (plan.tp_source, plan.pp_source) == ("model", "model")


def test_a_file_replaces_the_models_own_part_whole(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"tp_plan": {"lm_head": "colwise_rep"}}))
    plan = choose_plan(semantic_model(), tp_file=file, tp=2, pp=2)
    assert plan.tp == {"lm_head": "colwise_rep"}
    assert list(plan.pp) == list(PP)
    assert (plan.tp_source, plan.pp_source) == ("file", "model")


def test_an_argument_replaces_too_even_by_nothing() -> None:
    plan = choose_plan(semantic_model(), tp_file={}, tp=2)
    assert (plan.tp, plan.tp_source) == ({}, "argument")


def test_a_file_without_the_part_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("tp_plan: {lm_head: colwise_rep}\n")
    with pytest.raises(PlanError, match="has no pp_plan"):
        choose_plan(semantic_model(), pp_file=file, pp=2)


def test_entries_on_modules_override_those_on_the_config() -> None:
    model = semantic_model()
    model.config = SimpleNamespace(base_model_tp_plan={"embedding": "replicate", "layer_stack.final_norm": "replicate"})
    model.base_model_prefix = "causal_lm"
    plan = plan_of(model)
    assert plan.tp == TP | {"causal_lm.layer_stack.final_norm": "replicate"}
    assert plan.tp["causal_lm.embedding"] == "embedding_rowwise"


def test_a_nested_modules_plan_is_under_its_name() -> None:
    model = semantic_model()
    model.causal_lm._tp_plan = {"embedding": "replicate", "layer_stack.final_norm": "replicate"}
    plan = plan_of(model)
    assert plan.tp["causal_lm.layer_stack.final_norm"] == "replicate"
    assert plan.tp["causal_lm.embedding"] == "embedding_rowwise", "what stands nearer to the root overrides"


def test_a_config_speaks_of_the_part_that_has_it() -> None:
    model = llama()
    wrapper = nn.Module()
    wrapper.config, wrapper.inner = model.config, model
    assert "inner.model.layers.*.mlp.down_proj" in plan_of(wrapper).tp
    assert not [pattern for pattern in plan_of(wrapper).tp if pattern.startswith("layers")]


def test_a_plan_for_the_head_alone_is_no_plan() -> None:
    config = GptOssConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_local_experts=4, head_dim=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert plan_of(model).tp == {"lm_head": "colwise_gather_output"}
    assert not is_plan_of_layers(model, plan_of(model).tp)
    assert is_plan_of_layers(model, plan_of(model).pp)


def test_a_plan_with_wrong_names_is_a_plan() -> None:
    model = semantic_model()
    assert is_plan_of_layers(model, ["layers.*.attention.query_linear"])
    assert is_plan_of_layers(model, ["causal_lm.layer_stack.layers"])
    assert not is_plan_of_layers(model, ["lm_head"])
    assert not is_plan_of_layers(model, [])


def test_plans_of_a_config_in_a_file_are_relative_to_the_base(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("base_model_tp_plan: {layers.*.mlp.down_proj: rowwise}\ntp_plan: {lm_head: colwise_rep}\n")
    assert choose_plan(llama(), tp_file=file).tp == {
        "model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_rep",
    }

"""Planted mistakes: the proof fails at the module where they show, names the guilty entry, and a fix that holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.plans.proof_models import FUSED_PLAN, FusedModel, with_entries, zoo_model
from torch import nn

from shardwright.plans.groups import UnitGroup, UnitKind
from shardwright.plans.plan import ParallelPlan, PipelineEntry, plan_of
from shardwright.plans.prove import Divergence, prove_plan
from shardwright.plans.prove import trial as trials
from shardwright.plans.units import unit_groups


def divergence(model: nn.Module, plan: ParallelPlan, *, tp: int = 2, pp: int = 1) -> Divergence:
    """Where a proof fails. Raises AssertionError if it holds."""
    report = prove_plan(model, plan, tp=tp, pp=pp)
    assert not report.ok
    assert report.first_divergence is not None
    assert report.max_abs_diff >= (report.first_divergence.max_abs_diff or 0)
    return report.first_divergence


MUTATIONS = [
    # model, entry, word, module where it shows, fix
    ("llama", "self_attn.q_proj", None, "self_attn", "colwise"),
    ("llama", "self_attn.q_proj", "rowwise", "self_attn.q_proj", "colwise"),
    ("llama", "self_attn.k_proj", None, "self_attn", "colwise"),
    ("llama", "self_attn.v_proj", "colwise_rep", "self_attn", "colwise"),
    ("llama", "self_attn.o_proj", "colwise", "self_attn.o_proj", "rowwise"),
    ("llama", "self_attn.o_proj", None, "self_attn.o_proj", "rowwise"),
    ("llama", "self_attn.o_proj", "local_rowwise", "self_attn.o_proj", "rowwise"),
    ("llama", "mlp.gate_proj", None, "mlp", "colwise"),
    ("llama", "mlp.up_proj", "rowwise", "mlp.up_proj", "colwise"),
    ("llama", "mlp.down_proj", "colwise", "mlp.down_proj", "rowwise"),
    ("llama", "mlp.down_proj", "local_rowwise", "mlp.down_proj", "rowwise"),
    ("llama", "lm_head", "colwise", "lm_head", "colwise_gather_output"),
    ("llama", "embed_tokens", "rowwise", "embed_tokens", "embedding_rowwise"),
    ("qwen2", "self_attn.k_proj", None, "self_attn", "colwise"),
    ("gemma2", "mlp.down_proj", "rowwise_rep", "mlp.down_proj", "rowwise"),
    ("mixtral", "mlp.experts.down_proj", None, "mlp.experts", "rowwise"),
    ("mixtral", "mlp.experts", None, "mlp.experts", "moe_tp_experts"),
    ("qwen3_moe", "mlp.experts.gate_up_proj", None, "mlp.experts", "packed_colwise"),
]


@pytest.mark.parametrize(
    ("model_type", "ending", "word", "place", "right"), MUTATIONS, ids=[f"{m[0]}-{m[1]}-{m[2]}" for m in MUTATIONS]
)
def test_the_guilty_entry_of_a_transformers_model_is_named(
    model_type: str, ending: str, word: str | None, place: str, right: str
) -> None:
    model = zoo_model(model_type)
    plan = plan_of(model)
    entry = next(entry for entry in plan.tp if entry.endswith(ending))
    tp = {name: style for name, style in plan.tp.items() if name != entry} | ({entry: word} if word else {})
    found = divergence(model, replace(plan, tp=tp))
    assert found.module.endswith(place)
    assert found.likely_entry == entry
    assert found.fix is not None
    assert f'"{entry}": "{right}"' in found.fix
    assert found.fix_holds


@pytest.mark.parametrize(
    ("ending", "word", "place", "right"),
    [
        ("qkv", "rowwise", "qkv", "colwise"),
        ("qkv", "colwise_rep", "out", "colwise"),
        ("out", None, "out", "rowwise"),
        ("out", "local_rowwise", "out", "rowwise"),
        ("gate_up", None, "down", "colwise"),
        ("down", None, "down", "rowwise"),
        ("head", "colwise", "head", "colwise_gather_output"),
        ("embedding", "local_rowwise", "embedding", "embedding_rowwise"),
    ],
)
def test_the_guilty_entry_of_a_plain_module_is_named(ending: str, word: str | None, place: str, right: str) -> None:
    plan = with_entries(FUSED_PLAN, **{ending: word})
    entry = next(entry for entry in FUSED_PLAN.tp if entry.endswith(ending))
    found = divergence(FusedModel(), plan, tp=3)
    assert found.module.endswith(place)
    assert found.likely_entry == entry
    assert found.fix == f'"{entry}": "{right}"'
    assert found.fix_holds


def test_a_typo_is_mended_by_the_entry_that_is_missing() -> None:
    tp = {name.replace("out", "outt"): word for name, word in FUSED_PLAN.tp.items()}
    found = divergence(FusedModel(), replace(FUSED_PLAN, tp=tp))
    assert (found.likely_entry, found.fix) == ("blocks.*.out", '"blocks.*.out": "rowwise"')


def test_two_mistakes_are_mended_together() -> None:
    found = divergence(FusedModel(), with_entries(FUSED_PLAN, out="colwise", down="colwise"))
    assert (found.module, found.likely_entry) == ("blocks.block_0.out", "blocks.*.out")
    assert found.fix == '"blocks.*.out": "rowwise", "blocks.*.down": "rowwise"'
    assert found.fix_holds


def test_one_layer_that_is_cut_otherwise_is_named() -> None:
    wrong = replace(FUSED_PLAN, tp={**FUSED_PLAN.tp, "blocks.block_1.down": "local_rowwise"})
    found = divergence(FusedModel(), wrong)
    assert found.module == "blocks.block_1.down"
    assert found.likely_entry == "blocks.block_1.down"
    assert found.fix_holds


def wrong_groups(module: nn.Module, plan: ParallelPlan, *, kind: UnitKind, **changes: Any) -> list[UnitGroup]:
    """The unit groups of a model, with fused projections cut in another way."""

    def changed(group: UnitGroup) -> Iterator[Any]:
        for member in group.members:
            is_fused = "qkv" in member.name or "gate_up" in member.name
            yield replace(member, **changes) if is_fused and member.dim == 0 else member

    groups = unit_groups(module, plan)
    return [replace(g, members=tuple(changed(g))) if g.kind is kind else g for g in groups]


@pytest.mark.parametrize(
    ("kind", "changes", "entry"),
    [
        (UnitKind.HEADS, {"segments": ((0, 48), (48, 96), (96, 144))}, "blocks.*.qkv"),
        (UnitKind.FEATURES, {"segments": ((0, 160),)}, "blocks.*.gate_up"),
    ],
    ids=["heads side by side, not one after another", "gate and up as one"],
)
def test_projections_cut_in_wrong_units_are_found(
    monkeypatch: pytest.MonkeyPatch, kind: UnitKind, changes: dict[str, Any], entry: str
) -> None:
    monkeypatch.setattr(trials, "unit_groups", lambda module, plan: wrong_groups(module, plan, kind=kind, **changes))
    found = divergence(FusedModel(), FUSED_PLAN)
    assert found.max_abs_diff is not None
    assert found.max_abs_diff > 100 * found.tolerance
    assert found.likely_entry == entry


def test_a_pipeline_entry_that_names_nothing_of_what_is_handed_over_is_found() -> None:
    model = zoo_model("llama")
    plan = plan_of(model)
    wrong = replace(plan, pp={**plan.pp, "model.layers": PipelineEntry(("attention_mask",), ("hidden_states",))})
    found = divergence(model, wrong, tp=1, pp=2)
    assert (found.module, found.likely_entry) == ("model.layers", "model.layers")
    assert found.fix == '"model.layers": [["hidden_states", "attention_mask"], ["hidden_states"]]'
    assert prove_plan(model, plan, tp=1, pp=2)


def test_a_wrong_cut_shows_on_stages_too() -> None:
    model = zoo_model("llama")
    found = divergence(model, with_entries(plan_of(model), o_proj="local_rowwise"), tp=2, pp=2)
    assert found.module == "model.layers.0.self_attn.o_proj"
    assert found.likely_entry == "model.layers.*.self_attn.o_proj"
    assert found.fix_holds

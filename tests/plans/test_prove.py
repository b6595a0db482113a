"""Proofs hold for good plans, on any number of ranks and stages, and leave the model alone."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.plans.proof_models import FUSED_PLAN, VOCAB, FusedModel, with_entries, zoo_model
from torch import Tensor, nn

from shardwright.errors import PlanError
from shardwright.plans.pipeline import plan_pipeline
from shardwright.plans.plan import ParallelPlan, plan_of
from shardwright.plans.prove import prove_plan
from shardwright.plans.table import ShardTable

WITH_PLANS = (
    "apertus", "arcee", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "granite", "helium", "jais2", "llama", "llama4_text", "ministral", "mistral", "mixtral", "nanochat",
    "nemotron", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "starcoder2",
)  # fmt: skip
"""Architectures that bring a plan."""


@pytest.mark.parametrize("model_type", WITH_PLANS)
def test_plans_that_models_bring_hold_on_two_ranks(model_type: str) -> None:
    report = prove_plan(zoo_model(model_type), tp=2)
    assert report.ok, report.first_divergence
    assert report.max_abs_diff <= report.tolerance
    assert report.modules_compared >= 20


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "smollm3"])
@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (1, 2), (2, 2)])
def test_plans_hold_on_uneven_ranks_and_on_stages(model_type: str, tp: int, pp: int) -> None:
    report = prove_plan(zoo_model(model_type), tp=tp, pp=pp)
    assert report.ok, report.first_divergence
    assert (report.tp, report.pp) == (tp, pp)
    assert "cuts no parameter" not in str(report.notes)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (4, 1), (5, 1), (1, 3), (2, 2)])
def test_a_plain_module_with_fused_projections_holds(tp: int, pp: int) -> None:
    report = prove_plan(FusedModel(), FUSED_PLAN, tp=tp, pp=pp)
    assert report.ok, report.first_divergence
    assert report.modules_compared >= 20


def test_a_split_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(PlanError, match="pp split 2,1 does not deal 4 layers to 2 stages"):
        prove_plan(zoo_model("gemma2"), pp=2, pp_split=(2, 1))
    with pytest.raises(PlanError, match="pp split 1,1,2 names 3 stages, and pp is 2"):
        prove_plan(zoo_model("gemma2"), pp=2, pp_split=(1, 1, 2))


@pytest.mark.parametrize("split", [(1, 3), (3, 1)])
def test_stages_have_the_layers_of_a_split(split: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def noting(module: nn.Module, table: ShardTable, **options: Any) -> Any:
        seen.append(tuple(len(stage.layers) for stage in table.stages))
        return plan_pipeline(module, table, **options)

    monkeypatch.setattr("shardwright.plans.prove.trial.plan_pipeline", noting)
    assert prove_plan(zoo_model("gemma2"), pp=2, pp_split=split)
    assert seen == [split]


def test_the_model_is_left_alone() -> None:
    model = FusedModel()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    assert prove_plan(model, FUSED_PLAN, tp=2)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embedding.weight
    assert model.training
    assert model(torch.arange(4)[None]).requires_grad


def test_a_function_that_builds_the_model_will_do() -> None:
    assert prove_plan(FusedModel, FUSED_PLAN, tp=2)


def test_the_models_own_weights_are_used_if_asked_for() -> None:
    model = FusedModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    own, random = (prove_plan(model, FUSED_PLAN, tp=2, weights=weights) for weights in (True, False))
    assert (own.max_abs_diff, own.ok) == (0, True)
    assert random.max_abs_diff > 0
    half = FusedModel().bfloat16()
    assert prove_plan(half, FUSED_PLAN, tp=2, weights=True)
    assert half.head.weight.dtype is torch.bfloat16
    with pytest.raises(PlanError, match="the model has no weights"):
        prove_plan(zoo_model("llama"), tp=2, weights=True)


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, same, other = (prove_plan(FusedModel(), FUSED_PLAN, tp=3, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first.max_abs_diff != other.max_abs_diff


def test_json_has_the_agreed_shape() -> None:
    good = prove_plan(FusedModel(), FUSED_PLAN, tp=2).as_json()
    keys = {"ok", "tp", "pp", "dtype", "max_abs_diff", "tolerance", "modules_compared", "first_divergence"}
    assert keys <= good.keys()
    assert (good["ok"], good["dtype"], good["first_divergence"]) == (True, "float32", None)
    bad = prove_plan(FusedModel(), with_entries(FUSED_PLAN, down=None), tp=2).as_json()
    assert {"module", "max_abs_diff", "likely_entry", "fix"} <= bad["first_divergence"].keys()
    assert json.loads(json.dumps(bad)) == bad


def test_a_plan_that_cuts_nothing_is_noted() -> None:
    report = prove_plan(FusedModel(), ParallelPlan(), tp=2)
    assert report.ok
    assert "the plan cuts no parameter: every rank computes everything" in report.notes


def test_progress_is_told() -> None:
    said: list[str] = []
    prove_plan(FusedModel(), FUSED_PLAN, tp=2, progress=said.append)
    assert said == ["running the model as it is", "running 2 ranks"]


class HardCodedHeads(nn.Module):
    """An attention whose code says how many heads there are, and adds something for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).view(1, -1, 4, 4).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q = q + torch.arange(4)[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(1, -1, 16))  # type: ignore[no-any-return]  # nn.Module's call


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(HardCodedHeads() for _ in range(2))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]  # nn.Module's call


def test_code_that_cannot_be_cut_is_noted_and_held_whole() -> None:
    words = {f"layers.*.{name}": "colwise" for name in ("q", "k", "v")} | {"layers.*.out": "rowwise"}
    report = prove_plan(HardCoded(), ParallelPlan(tp=words | {"head": "colwise_rep"}), tp=2)
    assert report.ok, report.first_divergence
    assert any("layers.0" in note and "every rank holds all of it" in note for note in report.notes)


def fails(_: Tensor) -> Tensor:
    raise RuntimeError("no such thing")


def explodes(x: Tensor) -> Tensor:
    return x / 0


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (fails, "own forward pass fails, at 'blocks.block_1.mlp_norm': RuntimeError: no such thing"),
        (explodes, "not finite"),
    ],
)
def test_a_model_that_does_not_run_is_said_so(behaviour: Callable[[Tensor], Tensor], message: str) -> None:
    def build() -> nn.Module:
        model = FusedModel()
        model.get_submodule("blocks.block_1.mlp_norm").forward = behaviour
        return model

    with pytest.raises(PlanError, match=re.escape(message)):
        prove_plan(build, FUSED_PLAN, tp=2)


def test_more_ranks_than_units_are_an_error() -> None:
    with pytest.raises(PlanError, match="cannot be dealt to 7 ranks"):
        prove_plan(FusedModel(), FUSED_PLAN, tp=7)
    with pytest.raises(PlanError, match="1 rank and 1 stage at least"):
        prove_plan(FusedModel(), FUSED_PLAN, tp=0)


def test_random_weights_leave_nothing_to_chance() -> None:
    """Every weight and bias of a plan that is shipped counts: changing any of them changes the logits."""
    from shardwright.plans.prove.subject import prepare

    model = zoo_model("qwen2")
    subject = prepare(model, tp=2, pp=1, names=plan_of(model).tp, own_weights=False, seed=0)
    with torch.no_grad():
        logits = subject.run(subject.module).logits
        assert 0.1 < float(logits.std()) < 100
        for name, parameter in subject.module.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1.5)
            gap = float((subject.run(subject.module).logits - logits).abs().max())
            parameter.copy_(kept)
            # A bias of keys adds the same to the scores of all keys, but for their rotation: it counts for little.
            assert gap > 1e-2 * float(logits.abs().max()) * (0.1 if "k_proj.bias" in name else 1), name

"""Layers with fewer heads than there are ranks, beside layers with more."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.plans.proof_models import VOCAB
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.errors import PlanError
from shardwright.plans import ParallelPlan, check_plan, infer_plan, prove_plan
from shardwright.plans.check import Severity
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import fitted_table
from shardwright.plans.table import ShardTable
from shardwright.plans.units import unit_groups

HIDDEN, HEAD = 24, 6


class Attention(nn.Module):
    """With a gate on what each head gives, a parameter beside its linears."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, heads * HEAD) for _ in range(3))
        self.gate = nn.Parameter(torch.randn(heads))
        self.out = nn.Linear(heads * HEAD, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out((attended * self.gate[:, None]).flatten(2))  # type: ignore[no-any-return]  # nn.Module's call


class Layer(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attention = Attention(heads)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]  # nn.Module's call


class Model(nn.Module):
    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(map(Layer, heads))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]  # nn.Module's call


COLUMNS = dict.fromkeys((f"layers.*.attention.{name}" for name in ("q", "k", "v", "gate")), "colwise")
REST = {
    "embedding": "embedding_rowwise",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
    "head": "colwise_gather_output",
}
PLAN = ParallelPlan(tp=COLUMNS | {"layers.*.attention.out": "rowwise"} | REST)
SUMMED_AROUND = ParallelPlan(
    tp=COLUMNS | {"layers.*.attention.out.weight": "local_rowwise", "layers.*.attention": "all_reduce"} | REST
)
FEW = "2 heads cannot be dealt to 3 ranks: every rank holds all of layers.1.attention.gate, q, k and 2 more"
LAYER_BYTES = 4 * (3 * (2 * HEAD * HIDDEN + 2 * HEAD) + 2 + HIDDEN * 2 * HEAD)


def table_of(model: nn.Module, plan: ParallelPlan = PLAN, *, tp: int = 3) -> ShardTable:
    return resolve(model, plan, unit_groups(model, plan), tp=tp)


@pytest.mark.parametrize("tp", [3, 4])
def test_layers_of_few_heads_are_held_whole_and_the_model_gives_its_own_numbers(tp: int) -> None:
    report = prove_plan(Model(4, 2, 2), PLAN, tp=tp)
    assert report.ok, report.first_divergence
    (note,) = report.notes
    assert note.startswith(FEW.replace("3 ranks", f"{tp} ranks"))
    assert "(and in 1 more layer)" in note


def test_inferred_plans_too() -> None:
    model = Model(4, 2)
    plan = infer_plan(model)
    assert plan.tp["layers.*.attention.q"] == "colwise"
    report = prove_plan(model, plan, tp=3, pp=2)
    assert report.ok, report.first_divergence
    assert report.notes[0].startswith(FEW)


def test_only_they_are_whole() -> None:
    table = table_of(Model(4, 2))
    dims = {name: row.dim for name, row in table.by_name.items()}
    assert {name for name, dim in dims.items() if dim is None and "attention" in name and "out.bias" not in name} == {
        f"layers.1.attention.{name}" for name in ("gate", "q.weight", "q.bias", "k.weight", "k.bias")
    } | {f"layers.1.attention.{name}" for name in ("v.weight", "v.bias", "out.weight")}
    assert (dims["layers.0.attention.gate"], dims["layers.1.up.weight"]) == (0, 0)
    assert table.by_name["layers.0.attention.out.bias"].once
    assert not table.by_name["layers.1.attention.out.bias"].once
    assert "layers.1.attention.out" not in table.modules
    (undealt,) = table.undealt
    assert (undealt.kind, undealt.units) == ("heads", 2)


def test_what_is_whole_on_every_rank_is_not_summed_around_it() -> None:
    model = Model(4, 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.get_submodule("attention.out").register_parameter("bias", None)
    report = prove_plan(model, SUMMED_AROUND, tp=3)
    assert report.ok, report.first_divergence
    assert "every rank holds all of layers.1.attention," in report.notes[0]
    table = table_of(model, SUMMED_AROUND)
    assert "layers.0.attention" in table.modules
    assert "layers.1.attention" not in table.modules


def test_the_check_warns_with_what_it_costs() -> None:
    report = check_plan(Model(4, 2, 2), PLAN, tp=3, pp=1)
    assert report.ok
    (warning,) = report.of(Severity.WARNING)
    assert (warning.where, warning.fix) == ("layers.*.attention.gate", "--tp 2")
    more = 2 * LAYER_BYTES - 2 * LAYER_BYTES // 3
    assert warning.message == f"{FEW} (and in 1 more layer), {more / 1024:.1f} KiB more than its share"


def test_ranks_warn_of_it(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(4, 2)
    with caplog.at_level(logging.WARNING, logger="shardwright"):
        fitting = fitted_table(model, table_of(model))
    assert [record.getMessage().startswith(FEW) for record in caplog.records] == [True]
    assert fitting.replicated == ()


def test_a_model_of_too_few_heads_everywhere_is_an_error() -> None:
    model = Model(2, 2)
    with pytest.raises(PlanError, match="2 heads cannot be dealt to 3 ranks: at most 2 ranks have a part in them"):
        table_of(model)
    report = check_plan(model, PLAN, tp=3, pp=1)
    assert [error.fix for error in report.of(Severity.ERROR)] == ["--tp 2"]
    assert table_of(model, tp=2).undealt == ()

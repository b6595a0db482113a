"""Quantized weights are cut between groups: ranks hold the codes of the whole, and compute its logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.plans.test_shard import largest_difference, logits_of
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn

from shardwright.errors import PlanError
from shardwright.layers.collectives import Collectives
from shardwright.layers.quantized_linear import Quantized, quantize_linears
from shardwright.loading.load import weight_bytes
from shardwright.plans.check import Severity, Subject, check
from shardwright.plans.choose import choose_plan
from shardwright.plans.deal import Deal
from shardwright.plans.groups import Member, UnitGroup, UnitKind, deal_grouped, most_ranks, ranges_of
from shardwright.plans.quantization import Quantization, quantization_of
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import fitted_table, shard
from shardwright.plans.styles import COLUMN, ROW, ROW_SPLIT, SUM, Style
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import run_ranks
from shardwright.plans.undealt import hold_whole
from shardwright.plans.units import unit_groups
from shardwright.weight_format import WeightFormat

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "tie_word_embeddings": True},
    "gpt2": {},
    "phi3": {},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8, "n_group": 2},
    "bloom": {},
    "qwen2_moe": {},
}
"""Uneven heads, a tied head, inputs first and fused by kind, fused gate and up, low ranks, fused by head, experts."""


@given(coarse=st.integers(1, 12), share=st.integers(1, 6), quantum=st.integers(1, 20), ranks=st.integers(1, 40))
def test_units_are_dealt_by_quanta(coarse: int, share: int, quantum: int, ranks: int) -> None:
    units = coarse * share
    most = most_ranks(units, coarse, quantum)
    if ranks > most:
        with pytest.raises(PlanError, match=f"at most {most} ranks"):
            deal_grouped(units, coarse, ranks, "heads", quantum)
        return
    pieces = deal_grouped(units, coarse, ranks, "heads", quantum)
    assert [unit for start, stop in pieces for unit in range(start, stop)] == list(range(units))
    assert all(start < stop for start, stop in pieces)
    assert all(start % quantum == 0 and (stop % quantum == 0 or stop == units) for start, stop in pieces)
    for start, stop in pieces:  # whole shared things, or a part of one
        assert (start % share == 0 and stop % share == 0) or start // share == (stop - 1) // share
    assert deal_grouped(units, coarse, most, "heads", quantum)


@given(
    keys=st.integers(1, 6),
    share=st.integers(1, 4),
    width=st.integers(1, 24),
    group_size=st.integers(1, 40),
    ranks=st.integers(1, 6),
)
def test_heads_are_dealt_so_that_no_quantized_group_is_cut(
    keys: int, share: int, width: int, group_size: int, ranks: int
) -> None:
    heads = keys * share
    output = Member("o.weight", 1, ((0, heads * width),), heads)
    members = (Member("q.weight", 0, ((0, heads * width),), heads), Member("k.weight", 0, ((0, keys * width),), keys))
    group = UnitGroup(UnitKind.HEADS, heads, (*members, output), "traced")
    inputs = {"q.weight": (1, 64), "k.weight": (1, 64), "o.weight": (1, heads * width)}
    quantization = Quantization(WeightFormat(4, group_size), inputs)
    quantum = quantization.quantum(group)
    assert (quantum * width) % group_size == 0
    if group.most_ranks(quantum) < ranks:
        return
    for piece in group.pieces(ranks, quantum):
        assert not quantization.splits("o.weight", 1, ranges_of(output, heads, piece))


def test_parts_that_begin_within_groups_are_not_dealt() -> None:
    two = Member("down.weight", 1, ((0, 40), (40, 80)), 40)
    group = UnitGroup(UnitKind.FEATURES, 40, (two,), "traced")
    assert Quantization(WeightFormat(8, 32), {"down.weight": (1, 80)}).quantum(group) == 40
    assert Quantization(WeightFormat(8, 8), {"down.weight": (1, 80)}).quantum(group) == 8
    assert Quantization(WeightFormat(8, 32), {}).quantum(group) == 1


def mlp(name: str, features: int) -> UnitGroup:
    whole = ((0, features),)
    members = (Member(f"{name}.up.weight", 0, whole, features), Member(f"{name}.down.weight", 1, whole, features))
    return UnitGroup(UnitKind.FEATURES, features, members, "traced")


def test_what_is_added_up_is_held_whole_together() -> None:
    """An expert of 32 features is one quantized group; the other could be dealt, and must not be in the same sum."""
    sizes = {"moe.a": 32, "moe.b": 64}
    quantization = Quantization(WeightFormat(8, 32), {f"{name}.down.weight": (1, size) for name, size in sizes.items()})
    groups = [mlp(*item) for item in sizes.items()]
    experts = {name[-1]: nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for name in sizes}
    module = nn.ModuleDict({"moe": nn.ModuleDict(experts)})

    def held(**styles: Style) -> list[tuple[str, ...]]:
        found = hold_whole(module, groups, styles, lambda member: True, ranks=2, quantization=quantization)
        assert [undealt.group_size for undealt in found] == [32]
        return [undealt.modules for undealt in found]

    assert held() == [("moe.a.up", "moe.a.down")]
    assert held(moe=SUM) == [("moe",)]


@pytest.mark.parametrize("style", [ROW_SPLIT, ROW])
def test_features_of_no_group_are_dealt_by_quantized_groups(style: Style) -> None:
    quantization = Quantization(WeightFormat(4, 32), {"out.weight": (1, 100), "short.weight": (1, 40)})
    deal = Deal([], 3, quantization)
    part = deal.part(["out.weight"], 1, 100, style)
    assert part is not None
    assert part.ranges == (((0, 64),), ((64, 96),), ((96, 100),))
    assert deal.part(["in.weight"], 0, 100, COLUMN) == part  # a column that goes into it
    assert deal.part(["short.weight"], 1, 40, style) is None
    assert deal.unplaced == {"short"}


def make_model(model_type: str, **fields: Any) -> nn.Module:
    with torch.no_grad():
        return draw(make_config(model_type, MODELS[model_type] | fields), seed=0).requires_grad_(False)


def table_of(model: nn.Module, quantization: Quantization, tp: int, pp: int = 1) -> ShardTable:
    plan = choose_plan(model, tp=tp, pp=pp)
    return resolve(model, plan, unit_groups(model, plan), tp=tp, pp=pp, quantization=quantization)


def quantized_part(
    model: nn.Module, table: ShardTable, quantization: Quantization, collectives: Collectives, **options: Any
) -> nn.Module:
    part = copy.deepcopy(model)
    shard(part, table, stage=0, collectives=collectives, **options)
    quantize_linears(part, quantization.inputs, quantization.format)
    return part


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", MODELS)
def test_ranks_hold_the_codes_of_the_whole_and_give_its_logits(model_type: str, bits: Any) -> None:
    model = make_model(model_type)
    quantization = quantization_of(model, WeightFormat(bits, 8))
    assert quantization is not None
    fitting = fitted_table(model, table_of(model, quantization, tp=3))
    assert not fitting.table.undealt
    assert any(row.quantized and row.dim == row.input_dim for row in fitting.table.parameters)
    whole = copy.deepcopy(model)
    quantize_linears(whole, quantization.inputs, quantization.format)
    expected = logits_of(whole)
    assert not torch.allclose(expected, logits_of(model), atol=1e-3)

    def run(collectives: Collectives) -> tuple[Tensor, int]:
        part = quantized_part(model, fitting.table, quantization, collectives, fitted=fitting.fitted)
        for name, held in part.named_modules():
            if isinstance(held, Quantized):
                row = fitting.table.by_name[f"{name}.weight"]
                there = whole.get_submodule(name).weight
                if row.dim is not None:
                    parts = [there.narrow(row.dim, a, b - a) for a, b in row.ranges[collectives.rank]]
                    there = torch.cat(parts, row.dim)
                assert torch.equal(held.weight, there), name
        return logits_of(part), weight_bytes(part)

    outputs = run_ranks(3, run)
    assert largest_difference([logits for logits, _ in outputs], expected) < 1e-5
    assert [size for _, size in outputs] == [fitting.table.weight_bytes(0, rank) for rank in range(3)]


def test_what_cannot_be_dealt_by_groups_is_held_whole() -> None:
    model = make_model("llama", intermediate_size=64, head_dim=32)
    quantization = quantization_of(model, WeightFormat(8, 32))
    assert quantization is not None
    table = table_of(model, quantization, tp=3)  # 9 heads of 32 can be dealt, 64 features not to 3
    assert {group.kind for group in table.undealt} == {UnitKind.FEATURES}
    assert table.by_name["model.layers.0.mlp.down_proj.weight"].dim is None
    assert table.by_name["model.layers.0.mlp.gate_proj.weight"].dim is None
    assert "model.layers.0.mlp.down_proj" not in table.modules
    whole = copy.deepcopy(model)
    quantize_linears(whole, quantization.inputs, quantization.format)
    expected = logits_of(whole)
    outputs = run_ranks(3, lambda c: logits_of(quantized_part(model, table, quantization, c)))
    assert largest_difference(outputs, expected) < 1e-5

    plan = choose_plan(model, tp=3)
    groups = unit_groups(model, plan)
    subject = Subject(module=model, plan=plan, tp=3, pp=1, pp_split=None, groups=groups, quantization=quantization)
    found = check(subject)
    assert found.ok
    [warning] = found.of(Severity.WARNING)
    assert "features that lie in quantized groups of 32 cannot be dealt to 3 ranks" in warning.message
    assert warning.fix == "a smaller --quantization-group-size"


def test_stages_are_balanced_by_quantized_bytes() -> None:
    model = make_model("llama", num_hidden_layers=6, hidden_size=144)
    quantization = quantization_of(model, WeightFormat(4, 16))
    assert quantization is not None
    table, plain = (
        table_of(model, quantization, tp=1, pp=2),
        table_of(model, Quantization(quantization.format, {}), 1, 2),
    )
    assert [len(stage.layers) for stage in plain.stages] == [3, 3]
    counts = [len(stage.layers) for stage in table.stages]
    assert sum(counts) == 6
    assert max(table.weight_bytes(stage, 0) for stage in range(2)) < max(plain.weight_bytes(s, 0) for s in range(2)) / 2

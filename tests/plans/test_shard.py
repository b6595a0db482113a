"""Models cut for simulated ranks give the logits of the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel import gather_logits_once
from shardwright.models.build import build_module
from shardwright.plans.choose import choose_plan
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import fitted_table, shard
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import run_ranks
from shardwright.plans.units import unit_groups

IDS = torch.tensor([[5, 9, 3, 77, 12, 40, 8, 101]])

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gpt2": {},
    "gpt_bigcode": {},
    "phi3": {},
    "olmo2": {"num_key_value_heads": 4},
    "qwen2": {},
    "opt": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "bloom": {},
    "persimmon": {},
    "mixtral": {},
    "qwen2_moe": {},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8, "n_group": 2},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 96},
    "gpt_oss": {},
    "stablelm": {"qk_layernorm": True},
}
"""Uneven heads, tied and scaled embeddings, other linears, one key head, fused and gathered projections, biases of
row-cut linears, biases by the number of a head, experts, and a norm for every head, which cannot be cut."""


def make_model(model_type: str) -> nn.Module:
    with torch.no_grad():
        return draw(make_config(model_type, MODELS[model_type]), seed=0).requires_grad_(False)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def table_of(model: nn.Module, plan: ParallelPlan, *, tp: int, pp: int = 1) -> ShardTable:
    return resolve(model, plan, unit_groups(model, plan), tp=tp, pp=pp)


def sharded_logits(model: nn.Module, table: ShardTable, **options: Any) -> list[Tensor]:
    def run(collectives: Collectives) -> Tensor:
        part = copy.deepcopy(model)
        shard(part, table, stage=0, collectives=collectives, **options)
        return logits_of(part)

    return run_ranks(table.tp, run)


def largest_difference(outputs: list[Tensor], expected: Tensor) -> float:
    return max(float((output - expected).abs().max() / expected.abs().max()) for output in outputs)


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("model_type", MODELS)
def test_ranks_give_the_logits_of_the_whole_model(model_type: str, tp: int) -> None:
    model = make_model(model_type)
    table = table_of(model, choose_plan(model, tp=tp), tp=tp)
    fitting = fitted_table(model, table)
    outputs = sharded_logits(model, fitting.table, fitted=fitting.fitted)
    assert largest_difference(outputs, logits_of(model)) < 1e-5
    held_whole = {name.rpartition(".")[2] for misfit in fitting.replicated for name in misfit.modules}
    assert held_whole == ({"self_attn"} if model_type == "stablelm" else set())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "phi3"])
def test_a_rank_holds_its_share_and_no_views_of_the_whole(model_type: str) -> None:
    model = make_model(model_type)
    table = table_of(model, choose_plan(model, tp=2), tp=2)

    def held(collectives: Collectives) -> int:
        part = copy.deepcopy(model)
        shard(part, table, stage=0, collectives=collectives)
        parameters = list(part.parameters())
        assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in parameters)
        return sum(p.nbytes for p in parameters)

    held_bytes = run_ranks(2, held)
    assert held_bytes == [table.weight_bytes(0, rank) for rank in range(2)]
    assert max(held_bytes) < 0.75 * sum(p.nbytes for p in model.parameters())


def test_parameters_on_meta_get_the_shapes_of_the_part_and_stay_there() -> None:
    model = build_module(make_config("llama", MODELS["llama"]), torch.float32, trust_remote_code=False)
    model.tie_weights(recompute_mapping=False)
    table = table_of(model, choose_plan(model, tp=2), tp=2)

    def shapes(collectives: Collectives) -> dict[str, tuple[int, ...]]:
        part = copy.deepcopy(model)
        shard(part, table, stage=0, collectives=collectives)
        assert all(p.is_meta for p in part.parameters())
        query = part.get_submodule("model.layers.0.self_attn.q_proj")
        assert (query.out_features, query.in_features) == tuple(query.weight.shape)
        return {name: tuple(p.shape) for name, p in part.named_parameters()}

    for rank, found in enumerate(run_ranks(2, shapes)):
        assert found == {row.name: row.local_shape(rank) for row in table.parameters}
        assert found["model.layers.0.self_attn.q_proj.weight"] == ((96, 144) if rank == 0 else (48, 144))


def test_tied_embeddings_stay_one_tensor() -> None:
    model = make_model("llama")
    table = table_of(model, choose_plan(model, tp=3), tp=3)

    def is_one(collectives: Collectives) -> bool:
        part = copy.deepcopy(model)
        shard(part, table, stage=0, collectives=collectives)
        return part.get_input_embeddings().weight is part.get_output_embeddings().weight

    assert run_ranks(3, is_one) == [True] * 3


def test_parameters_of_other_stages_are_empty() -> None:
    model = make_model("mixtral")
    table = table_of(model, choose_plan(model, tp=2, pp=2), tp=2, pp=2)
    for stage in range(2):

        def held(collectives: Collectives, stage: int = stage) -> set[str]:
            part = copy.deepcopy(model)
            shard(part, table, stage=stage, collectives=collectives)
            return {name for name, p in part.named_parameters() if p.numel()}

        expected = {row.name for row in table.parameters if stage in row.stages}
        assert run_ranks(2, held) == [expected, expected]
        assert 0 < len(expected) < len(table.parameters)


def test_logits_can_go_to_the_first_rank_alone() -> None:
    model = make_model("llama")
    table = table_of(model, choose_plan(model, tp=2), tp=2)

    def run(collectives: Collectives) -> Tensor:
        part = copy.deepcopy(model)
        shard(part, table, stage=0, collectives=collectives)
        gather_logits_once(part)
        return logits_of(part)

    first, second = run_ranks(2, run)
    assert largest_difference([first], logits_of(model)) < 1e-5
    assert second.shape == first.shape
    assert not second.any()


EXPERTS = "model.layers.*.mlp.experts"


@pytest.mark.parametrize(
    "entries",
    [{EXPERTS: "ep_dispatch_experts"}, {EXPERTS: "gather", "model.layers.*.mlp.gate": "ep_router"}],
    ids=["v5", "v4"],
)
def test_whole_experts_are_dealt_unevenly(entries: dict[str, str]) -> None:
    model = make_model("mixtral")
    weights = dict.fromkeys((f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"), "grouped_gemm")
    table = table_of(model, ParallelPlan(tp=entries | weights), tp=3)
    assert table.by_name["model.layers.0.mlp.experts.down_proj"].pieces(3) == [2, 1, 1]
    assert largest_difference(sharded_logits(model, table), logits_of(model)) < 1e-5

"""Plans for models that carry none."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.builder import make_config
from torch import Tensor, nn
from transformers import LlamaConfig

from shardwright.errors import PlanError
from shardwright.models.build import build_module
from shardwright.plans.groups import UnitGroup, UnitKind
from shardwright.plans.infer import infer_plan
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import resolve
from shardwright.plans.units import unit_groups

WIDTH, VOCAB = 48, 40


class Attention(nn.Module):
    """Six query heads of eight, two key heads, in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.keys, self.width = 6, 2, 8
        self.qkv = nn.Linear(WIDTH, (self.heads + 2 * self.keys) * self.width)
        self.out = nn.Linear(self.heads * self.width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.heads * self.width, self.keys * self.width, self.keys * self.width]
        q, k, v = (part.view(*x.shape[:2], -1, self.width).transpose(1, 2) for part in self.qkv(x).split(sizes, dim=-1))
        share = self.heads // self.keys
        made = F.scaled_dot_product_attention(
            q, k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1), is_causal=True
        )
        return self.out(made.transpose(1, 2).flatten(2))


class Beside(nn.Module):
    """Six query heads, beside two of keys and values in one projection: all keys, then all values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.keys, self.width = 6, 2, 8
        self.q, self.kv = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 32)
        self.out = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q = self.q(x).view(b, t, self.keys, self.heads // self.keys, self.width).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).view(b, t, 2, self.keys, 1, self.width).permute(2, 0, 3, 4, 1, 5)
        made = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(made.permute(0, 3, 1, 2, 4).reshape(b, t, c))


class Tiled(Beside):
    """The keys are repeated as a whole: of six query heads, the first, third and fifth use one of them."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q = self.q(x).view(b, t, self.heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.keys, self.width).permute(2, 0, 3, 1, 4)
        k, v = (part.repeat(1, self.heads // self.keys, 1, 1) for part in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


class Wide(nn.Module):
    """An MLP whose features are normalised before they are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 96), nn.LayerNorm(96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.relu(self.up(x))))


class Raw(nn.Module):
    """An MLP of bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(WIDTH, 2, 64))
        self.w_out = nn.Parameter(torch.empty(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,dkf->kbtf", x, self.w_in)
        return (torch.sigmoid(gate) * up) @ self.w_out


class Einsum(nn.Module):
    """Heads in a dimension of their own, which no word cuts: the first of three."""

    def __init__(self) -> None:
        super().__init__()
        self.w_v = nn.Parameter(torch.empty(WIDTH, 6, 8))
        self.w_o = nn.Parameter(torch.empty(6, 8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthd,hdc->btc", torch.einsum("btc,chd->bthd", x, self.w_v).softmax(-1), self.w_o)


class Chosen(nn.Module):
    """Experts in a list, of which code runs those that its tokens chose."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat, made = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        weight, choice = self.router(flat).softmax(-1).max(-1)
        for number, expert in enumerate(self.experts):
            places = (choice == number).nonzero()[:, 0]
            if len(places):
                made[places] = expert(flat[places]) * weight[places, None]
        return made.view_as(x)


class Layer(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in parts)
        self.parts = nn.ModuleDict({type(part).__name__.lower(): part for part in parts})

    def forward(self, stream: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts.values(), strict=True):
            stream = stream + part(norm(stream))
        return stream


class Numbered(nn.Module):
    """A model whose layers are attributes with numbers; what comes last is made first."""

    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.last_norm = nn.LayerNorm(WIDTH)
        self.layer_0 = Layer(*(kind() for kind in kinds))
        self.layer_1 = Layer(*(kind() for kind in kinds))
        self.table = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.layer_1(self.layer_0(self.table(ids)))
        return self.head(self.last_norm(stream))


def on_meta(*kinds: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return Numbered(*kinds).eval()


def of_layer(plan: ParallelPlan) -> dict[str, str]:
    """Words of a plan's first layer."""
    first = "layer_0.parts."
    return {name.removeprefix(first): word for name, word in plan.tp.items() if name.startswith(first)}


def members(groups: list[UnitGroup], name: str) -> list[Any]:
    return [m for group in groups for m in group.members if m.name == name]


def test_fused_projection_is_cut_by_heads() -> None:
    module = on_meta(Attention)
    plan = infer_plan(module)
    assert of_layer(plan) == {"attention.qkv": "packed_colwise", "attention.out": "rowwise"}
    groups = unit_groups(module, plan)
    queries, shared = members(groups, "layer_1.parts.attention.qkv.weight")
    assert (queries.segments, queries.units) == (((0, 48),), 6)
    assert (shared.segments, shared.units) == (((48, 64), (64, 80)), 2)
    table = resolve(module, plan, groups, tp=4)
    row = table.by_name["layer_0.parts.attention.qkv.bias"]
    assert row.ranges[:2] == (((0, 16), (48, 56), (64, 72)), ((16, 24), (48, 56), (64, 72)))
    assert table.by_name["layer_0.parts.attention.out.weight"].pieces(4) == [16, 8, 16, 8]
    assert table.by_name["layer_0.parts.attention.out.bias"].once


def test_keys_and_values_beside_queries_are_cut_by_heads() -> None:
    module = on_meta(Beside)
    plan = infer_plan(module)
    assert of_layer(plan) == {"beside.q": "colwise", "beside.kv": "packed_colwise", "beside.out": "rowwise"}
    groups = unit_groups(module, plan)
    (shared,) = members(groups, "layer_1.parts.beside.kv.weight")
    assert (shared.segments, shared.units) == (((0, 16), (16, 32)), 2)
    rows = resolve(module, plan, groups, tp=2).by_name
    assert rows["layer_0.parts.beside.q.weight"].ranges == (((0, 24),), ((24, 48),))
    assert rows["layer_0.parts.beside.kv.bias"].ranges == (((0, 8), (16, 24)), ((8, 16), (24, 32)))


def test_query_heads_go_with_the_key_that_they_use_wherever_they_are() -> None:
    module = on_meta(Tiled)
    plan = infer_plan(module)
    assert of_layer(plan) == {"tiled.q": "packed_colwise", "tiled.kv": "packed_colwise", "tiled.out": "rowwise"}
    rows = resolve(module, plan, unit_groups(module, plan), tp=2).by_name
    even, odd = ((0, 8), (16, 24), (32, 40)), ((8, 16), (24, 32), (40, 48))
    assert rows["layer_0.parts.tiled.q.weight"].ranges == rows["layer_0.parts.tiled.out.weight"].ranges == (even, odd)
    assert rows["layer_0.parts.tiled.kv.weight"].ranges == (((0, 8), (16, 24)), ((8, 16), (24, 32)))


def test_what_is_normalised_is_put_together() -> None:
    plan = infer_plan(on_meta(Wide))
    assert of_layer(plan) == {"wide.up": "colwise_gather_output", "wide.down": "colwise_gather_output"}


def test_bare_parameters_are_cut_and_their_module_sums() -> None:
    module = on_meta(Raw)
    plan = infer_plan(module)
    assert of_layer(plan) == {"raw": "all_reduce", "raw.w_in": "local_rowwise", "raw.w_out": "colwise"}
    table = resolve(module, plan, unit_groups(module, plan), tp=2)
    assert table.by_name["layer_0.parts.raw.w_in"].dim == 2
    assert table.by_name["layer_0.parts.raw.w_out"].dim == 0


def test_what_no_word_can_cut_stays_whole() -> None:
    module = on_meta(Einsum)
    plan = infer_plan(module)
    assert of_layer(plan) == {}
    group = next(g for g in unit_groups(module, plan) if g.kind in (UnitKind.HEADS, UnitKind.FEATURES))
    assert {(m.name.rpartition(".")[2], m.dim) for m in group.members} == {("w_v", 1), ("w_o", 0)}


def test_code_that_looks_at_choices_is_followed() -> None:
    plan = infer_plan(on_meta(Chosen))
    words = of_layer(plan)
    assert "chosen.router" not in words
    assert set(words.values()) == {"colwise", "rowwise"}
    assert sum(word == "rowwise" for word in words.values()) == sum(word == "colwise" for word in words.values()) > 0


def test_pipeline_follows_the_order_of_calls() -> None:
    plan = infer_plan(on_meta(Attention, Raw))
    assert list(plan.pp) == ["table", "layer", "last_norm", "head"]
    assert plan.pp["table"].inputs == ("ids",)
    assert plan.pp["layer"].outputs == plan.pp["head"].inputs == ("stream",)
    assert plan.pp["head"].outputs == ("logits",)
    assert plan.no_split == {"Layer"}
    table = resolve(on_meta(Attention, Raw), plan, [], pp=2)
    assert table.by_name["table.weight"].stages == (0,)
    assert table.by_name["head.weight"].stages == table.by_name["last_norm.bias"].stages == (1,)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "gpt2",
            {"attn.c_attn": "packed_colwise", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"},
        ),
        (
            "gpt_bigcode",
            {"attn.c_attn": "packed_colwise", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"},
        ),
    ],
)
def test_fused_projections_of_transformers(model_type: str, expected: dict[str, str]) -> None:
    module = build_module(make_config(model_type, {}), torch.float32, trust_remote_code=False)
    plan = infer_plan(module)
    assert {n.removeprefix("transformer.h.*."): w for n, w in plan.tp.items() if ".h." in n} == expected


def test_the_module_stays_as_it_is() -> None:
    module = on_meta(Attention, Chosen)
    before = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    first, second = infer_plan(module), infer_plan(module)
    assert first == second
    assert {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()} == before
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())


def test_code_that_does_not_run_gives_a_reason_and_names_give_groups(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Numbered):
        def forward(self, ids: Tensor) -> Tensor:
            raise RuntimeError("needs a camera")

    module = Broken(Attention)
    with pytest.raises(PlanError, match="needs a camera"):
        infer_plan(module)
    groups = unit_groups(module, ParallelPlan(tp={"head": "colwise_gather_output", "table": "embedding_rowwise"}))
    assert "guessed from names" in caplog.text
    assert {group.source for group in groups} == {"names"}
    assert UnitKind.VOCABULARY in {group.kind for group in groups}


def test_seventy_billion_parameters_take_seconds() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    module = build_module(config, torch.bfloat16, trust_remote_code=False)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    groups = unit_groups(module, infer_plan(module))
    assert len([group for group in groups if group.kind is UnitKind.HEADS and group.units == 64]) == 80
    assert time.process_time() - start < 20, "it takes 7 s on one core"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KiB"

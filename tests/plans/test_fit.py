"""Code that asks attributes for head counts and widths, and code that cannot run on a part of its parameters."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.errors import PlanError
from shardwright.layers.collectives import Collectives
from shardwright.plans.fit import Fit, fit
from shardwright.plans.groups import Member, UnitGroup, UnitKind
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import fitted_table, shard
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import run_ranks

HEADS, HEAD_DIM, VOCAB = 4, 8, 32
WIDTH = HEADS * HEAD_DIM


class Attention(nn.Module):
    """Causal, with a count of heads as an attribute. Subclasses say it in other ways."""

    def __init__(self, heads: int = HEADS, head_dim: int = HEAD_DIM) -> None:
        super().__init__()
        width = heads * head_dim
        self.n_head, self.head_dim, self.width = heads, head_dim, width
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.n_head, self.head_dim).transpose(1, 2)

    def bias(self, length: int) -> Tensor | float:
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(linear(x)) for linear in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5 + self.bias(x.shape[1])
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.width))


class DictConfigAttention(Attention):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.cfg = config
        del self.n_head, self.width

    def forward(self, x: Tensor) -> Tensor:
        self_view = SimpleNamespace(n_head=self.cfg["heads"])
        q, k, v = (
            linear(x).view(*x.shape[:2], self_view.n_head, -1).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


@dataclasses.dataclass(frozen=True)
class Settings:
    n_head: int = HEADS
    widths: tuple[int, int] = (WIDTH, 4 * WIDTH)


class RecordConfigAttention(Attention):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        del self.n_head, self.width

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).view(*x.shape[:2], self.settings.n_head, -1).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], self.settings.widths[0]))


class SlopesOfWholeModel(Attention):
    """Biases by the number of a head, made of however many heads there are."""

    def bias(self, length: int) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.n_head + 1)
        return slopes[:, None, None] * torch.arange(length)


class WidthOfInput(Attention):
    """As wide as the input is the output, says this code, which is not so for a part of the heads."""

    def sizes(self, x: Tensor) -> tuple[int, int, int]:
        batch, length, width = x.size()
        return batch, length, width

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = self.sizes(x)
        q, k, v = (
            linear(x).view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class WidthOfInputByDimension(WidthOfInput):
    def sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.size(0), x.shape[1], x.size(dim=-1)


class WidthOfWeight(WidthOfInput):
    """Asks a weight that every rank has all rows of."""

    def sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], self.o.weight.shape[0]


class WithResidual(WidthOfInput):
    """One width is that of the whole here and of a part there."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(x.shape[-1]) + super().forward(x.clone())


class FusedWithResidual(Attention):
    """Views that fit in two ways each: there are as many heads as parts of the fused weight, and as sizes of a head."""

    def __init__(self) -> None:
        super().__init__(heads=3, head_dim=6)
        self.q = nn.Linear(self.width, 3 * self.width)
        del self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        fused = self.q(x).view(b, t, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*fused, is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, t, c))


class CountsInWeights(Attention):
    """Adds something that has as many heads as the whole."""

    def bias(self, length: int) -> Tensor:
        return torch.zeros(self.o.weight.shape[0] // self.head_dim, length, length)


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, number: int) -> None:
        super().__init__()
        self.attention, self.number = attention, number
        self.attention.layer_number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Model(nn.Module):
    def __init__(self, *attentions: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB)
        self.layers = nn.ModuleList(Layer(attention, number) for number, attention in enumerate(attentions))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


PLAN = ParallelPlan(
    tp={f"layers.*.attention.{n}": "colwise" for n in "qkv"} | {"layers.*.attention.o": "rowwise"}, tp_source="argument"
)


def table_of(model: Model, tp: int, heads: int = HEADS) -> ShardTable:
    groups = []
    for number, layer in enumerate(model.layers):
        width = layer.attention.o.in_features
        names = [f"layers.{number}.attention.{n}" for n in "qkv"]
        members = [Member(f"{name}.{leaf}", 0, ((0, width),), heads) for name in names for leaf in ("weight", "bias")]
        row = Member(f"layers.{number}.attention.o.weight", 1, ((0, width),), heads)
        groups.append(UnitGroup(UnitKind.HEADS, heads, (*members, row), "traced"))
    return resolve(model, PLAN, groups, tp=tp)


def largest_difference(model: Model, table: ShardTable, fitted: Fit | None = None) -> float:
    ids = torch.arange(1, 10)[None]

    def run(collectives: Collectives) -> Tensor:
        part = copy.deepcopy(model)
        shard(part, table, stage=0, collectives=collectives, fitted=fitted)
        with torch.no_grad():
            output: Tensor = part(ids)
        return output

    expected = model(ids).detach()
    return max(float((output - expected).abs().max()) for output in run_ranks(table.tp, run))


def made(kind: str) -> nn.Module:
    shared: dict[str, Any] = {"heads": HEADS, "layers": 2}
    makers = {
        "attributes": Attention,
        "dict": lambda: DictConfigAttention(shared),
        "record": lambda: RecordConfigAttention(Settings()),
        "input": WidthOfInput,
        "input by dimension": WidthOfInputByDimension,
        "weight": WidthOfWeight,
        "residual": WithResidual,
    }
    return makers[kind]()


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("kind", ["attributes", "dict", "record", "input", "input by dimension", "weight", "residual"])
def test_sizes_are_found_wherever_code_keeps_them(kind: str, tp: int) -> None:
    model = Model(made(kind), made(kind))
    assert largest_difference(model, table_of(model, tp)) < 1e-5


def test_of_several_ways_to_view_a_part_the_right_one_is_found() -> None:
    model = Model(FusedWithResidual(), FusedWithResidual(), width=18)
    groups = []
    for number in range(2):
        name = f"layers.{number}.attention"
        fused = tuple(Member(f"{name}.q.{leaf}", 0, ((0, 18), (18, 36), (36, 54)), 3) for leaf in ("weight", "bias"))
        groups.append(UnitGroup(UnitKind.HEADS, 3, (*fused, Member(f"{name}.o.weight", 1, ((0, 18),), 3)), "traced"))
    plan = ParallelPlan(tp={"layers.*.attention.q": "colwise", "layers.*.attention.o": "rowwise"}, tp_source="argument")
    table = resolve(model, plan, groups, tp=3)
    assert fit(model, table).misfits == ()
    assert largest_difference(model, table) < 1e-5


def test_only_what_must_change_is_changed_and_nothing_in_the_model_itself() -> None:
    model = Model(Attention(), Attention())
    found = fit(model, table_of(model, 3))
    changes = {(size.module, size.attribute): size.values for size in found.sizes}
    assert changes == {
        (f"layers.{number}.attention", attribute): values
        for number in range(2)
        for attribute, values in (("n_head", (2, 1, 1)), ("width", (16, 8, 8)))
    }
    assert (model.layers[0].attention.n_head, model.layers[0].attention.width) == (HEADS, WIDTH)


@pytest.mark.parametrize("tp", [2, 3])
def test_a_head_size_that_equals_the_count_is_told_from_it(tp: int) -> None:
    model = Model(Attention(heads=4, head_dim=4), width=16)
    table = table_of(model, tp)
    assert {size.attribute for size in fit(model, table).sizes} == {"n_head", "width"}
    assert largest_difference(model, table) < 1e-5


def test_the_number_of_a_layer_is_no_head_count() -> None:
    model = Model(*(Attention() for _ in range(HEADS + 2)))
    assert largest_difference(model, table_of(model, 2)) < 1e-5
    assert not any(size.attribute == "layer_number" for size in fit(model, table_of(model, 2)).sizes)


def test_a_config_that_layers_share_is_left_as_it_is() -> None:
    config = {"heads": HEADS, "layers": 2}
    model = Model(DictConfigAttention(config), DictConfigAttention(config))
    sizes = fit(model, table_of(model, 2)).sizes
    assert [(size.module, size.attribute) for size in sizes] == [
        ("layers.0.attention", "cfg.heads"),
        ("layers.1.attention", "cfg.heads"),
    ]
    assert config == {"heads": HEADS, "layers": 2}


def test_biases_that_depend_on_which_head_it_is_are_a_misfit() -> None:
    model = Model(SlopesOfWholeModel(), SlopesOfWholeModel())
    with pytest.raises(PlanError, match=r"layers.0.attention \(and 1 like it\) cannot be cut for 2 ranks.*or which"):
        largest_difference(model, table_of(model, 2))


def test_code_that_computes_whole_sizes_is_named_with_its_line() -> None:
    model = Model(CountsInWeights())
    table = table_of(model, 2)
    (misfit,) = fit(model, table).misfits
    assert misfit.modules == ("layers.0.attention",)
    assert "test_fit.py" in misfit.reason
    assert "view(*x.shape[:-1], -1, self.head_dim)" in misfit.reason


@pytest.mark.parametrize("attention", [SlopesOfWholeModel, CountsInWeights])
def test_what_cannot_be_cut_is_held_whole_and_the_rest_is_cut(attention: type[Attention]) -> None:
    model = Model(attention(), Attention())
    whole = table_of(model, 2)
    fitting = fitted_table(model, whole)
    assert [misfit.modules for misfit in fitting.replicated] == [("layers.0.attention",)]
    dims = {row.name: row.dim for row in fitting.table.parameters}
    assert dims["layers.0.attention.q.weight"] is None
    assert dims["layers.1.attention.q.weight"] == 0
    assert whole.weight_bytes(0, 0) < fitting.table.weight_bytes(0, 0) < sum(p.nbytes for p in model.parameters())
    assert largest_difference(model, fitting.table, fitting.fitted) < 1e-5


class Sharing(Attention):
    """Uses the keys and values of the layer before it, where that has handed some on."""

    def __init__(self, *, takes: bool) -> None:
        super().__init__()
        self.takes = takes

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        if self.takes:
            k, v = shared["k"], shared["v"]
        shared |= {"k": k, "v": v}
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SharingModel(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x, shared = self.embed(ids), dict[str, Tensor]()
        for layer in self.layers:
            x = x + layer.attention(x, shared)
        return self.head(x)


def test_a_module_that_is_given_parts_by_another_is_tried_out_with_it() -> None:
    model = SharingModel(Sharing(takes=False), Sharing(takes=True))
    table = table_of(model, 2)
    assert fit(model, table).misfits == ()
    assert largest_difference(model, table) < 1e-5


def test_weights_on_meta_are_enough() -> None:
    model = Model(Attention(), Attention())
    expected = fit(model, table_of(model, 2))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    assert fit(model, table_of(model, 2)) == expected


class SecondExpert(nn.Module):
    """Experts of which no token chooses the first, and nobody the last."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(2)
        )
        self.idle = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[1](x)


def test_what_a_few_tokens_do_not_choose_is_as_what_they_do() -> None:
    model = Model(SecondExpert(), SecondExpert())
    words = {
        f"layers.*.attention.{name}.{n}": w
        for name in ("experts.*", "idle")
        for n, w in enumerate(("colwise", "", "rowwise"))
        if w
    }
    plan = ParallelPlan(tp=words)
    sizes = {"experts.0": 64, "experts.1": 64, "idle": 96}
    groups = [
        UnitGroup(
            UnitKind.FEATURES,
            8,
            tuple(
                Member(f"layers.{layer}.attention.{name}.{leaf}", dim, ((0, size),), 8)
                for leaf, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
            ),
            "traced",
        )
        for layer in range(2)
        for name, size in sizes.items()
    ]
    found = fit(model, resolve(model, plan, groups, tp=2))
    assert [misfit.modules for misfit in found.misfits] == [("layers.0.attention.idle", "layers.1.attention.idle")]
    assert found.misfits[0].reason == "nothing calls it"

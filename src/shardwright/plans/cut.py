"""Change a model in place into what one rank runs.

Parameters become this rank's parts, modules that the plan names split, gather or add up, and what belongs to other
pipeline stages is dropped. The model's code runs on as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shardwright.errors import PlanError
from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel import become
from shardwright.layers.parallel_embedding import VocabRows
from shardwright.layers.parallel_experts import DealtExperts, DealtRouter
from shardwright.layers.parallel_module import DividedInput, GatheredOutput, Parallel, SplitInput, SummedOutput
from shardwright.layers.parallel_pieces import Pieces
from shardwright.plans.groups import UnitKind
from shardwright.plans.resolve import has_inputs_first
from shardwright.plans.sizes import Local, view_with
from shardwright.plans.slices import ShardSlice
from shardwright.plans.styles import DISPATCH, IDENTITY_EXPERT, ROUTER, Cut, Input, Output, Style
from shardwright.plans.table import ParameterRow, ShardTable

EXPERT_ROW_BYTES = 16
"""Rows of experts' weights are a multiple of this, or torch does not multiply all experts in one call."""

SKIPS_OTHERS = "_is_expert_parallel"
"""Attribute of Transformers' experts: their code leaves out choices whose index is the number of its experts."""


@torch.no_grad()
def cut(
    module: nn.Module,
    table: ShardTable,
    *,
    stage: int,
    collectives: Collectives,
    sizes: Iterable[Local] = (),
) -> None:
    """Make a whole model one rank's part of it.

    Parameters on "meta" stay there, in the shape of the part; others are sliced. Those of other stages become empty.

    Args:
        module: the whole model, changed in place.
        table: its plan, resolved.
        stage: pipeline stage of this rank.
        collectives: of the tensor-parallel ranks of its stage; as many as the table is for.
        sizes: what its modules are to read of what this rank has, from `plans.fit`.

    Raises: PlanError if the numbers of ranks differ.
    """
    if collectives.size != table.tp:
        raise PlanError(f"the plan is resolved for {table.tp} tensor-parallel ranks, and there are {collectives.size}")
    part = ShardSlice(table, stage, collectives.rank)
    for row in table.parameters:
        _cut_parameter(module, row, part)
    if table.tp == 1:
        return
    rows = _rows_by_module(table, stage)
    for name, style in table.modules.items():
        _act(module, name, style, rows, collectives)
    for name, held in rows.items():
        if any(row.dim is not None for row in held.values()):
            _declare_sizes(module.get_submodule(name), held, collectives)
    head = _head(module, table)
    if isinstance(head, GatheredOutput):
        head.makes_logits = True
    for size in sizes:
        size.apply(module.get_submodule(size.module), collectives)


def _cut_parameter(module: nn.Module, row: ParameterRow, part: ShardSlice) -> None:
    old = module.get_parameter(row.name)
    if part.stage not in row.stages:
        value = torch.empty(0, dtype=old.dtype)
    elif row.dim is None and not row.once:
        return
    else:
        value = part.empty_like(row, old) if old.is_meta else part.take(row.name, old.detach())
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    for name in (row.name, *row.aliases):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new)


def _act(
    module: nn.Module, name: str, style: Style, rows: dict[str, dict[str, ParameterRow]], collectives: Collectives
) -> None:
    """Put a style's behaviour in front of a module."""
    held = module.get_submodule(name)
    weight = next((row for row in rows.get(name, {}).values() if row.dim is not None and len(row.shape) > 1), None)
    parts: list[type[Parallel]] = []
    values: dict[str, object] = {}
    if style.cut is Cut.VOCABULARY and weight is not None:
        parts, values = [VocabRows], {"row_pieces": Pieces(weight.ranges)}
    elif style == IDENTITY_EXPERT:
        parts = [DividedInput]
    elif style in (DISPATCH, ROUTER):
        if (experts := _experts_near(name, rows)) is not None:
            values["expert_pieces"] = Pieces(experts.ranges)
            parts = [DealtRouter]
            if style == DISPATCH:
                parts = [SummedOutput, DealtExperts]
                values["skips_others"] = hasattr(held, SKIPS_OTHERS)
    else:
        if style.output is Output.SUMMED and style.cut is not Cut.VOCABULARY:
            parts.append(SummedOutput)
        elif style.output is Output.GATHERED and weight is not None:
            parts.append(GatheredOutput)
            values["output_pieces"] = Pieces(weight.ranges)
        if style.input is Input.SPLIT and weight is not None:
            parts.append(SplitInput)
            values["input_pieces"] = Pieces(weight.ranges)
    if parts:
        become(held, *parts, collectives=collectives, **values)


def _declare_sizes(held: nn.Module, rows: dict[str, ParameterRow], collectives: Collectives) -> None:
    """Make what a module says of the sizes of its parameters true of this rank's parts."""
    shape = {leaf: row.local_shape(collectives.rank) for leaf, row in rows.items()}
    weight = shape.get("weight", ())
    if isinstance(held, nn.Linear):
        held.out_features, held.in_features = weight
        if type(held) is nn.Linear and rows["weight"].dim == 0:
            become(held, Parallel, collectives=collectives)
    elif isinstance(held, nn.Embedding):
        held.num_embeddings, held.embedding_dim = weight
        if isinstance(held, VocabRows) and held.padding_idx is not None:  # of no meaning without gradients
            held.padding_idx = None
    elif isinstance(held, nn.Conv1d) and held.groups == held.out_channels == rows["weight"].shape[0]:
        held.in_channels = held.out_channels = held.groups = weight[0]
    elif has_inputs_first(held):
        setattr(held, "nf", weight[1])  # noqa: B010 - it is no nn.Linear, and only known by its attributes
    for row in rows.values():
        if row.style.cut is Cut.EXPERTS:
            _declare_experts(held, row, collectives.rank)
        if len(row.shape) == 3 and shape[row.name.rpartition(".")[2]][-1] * row.element_bytes % EXPERT_ROW_BYTES:
            _avoid_grouped_products(held)


def _declare_experts(held: nn.Module, row: ParameterRow, rank: int) -> None:
    """Let a module of experts count its own."""
    for attribute, value in vars(held).items():
        if type(value) is int and value == row.shape[0] and "expert" in attribute:
            setattr(held, attribute, row.local_shape(rank)[0])
    if hasattr(held, SKIPS_OTHERS):
        setattr(held, SKIPS_OTHERS, True)


def _avoid_grouped_products(held: nn.Module) -> None:
    """Let Transformers' experts multiply one after another."""
    config: Any = getattr(held, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:
        held.config = view_with(config, _experts_implementation="eager")  # type: ignore[assignment]


def _rows_by_module(table: ShardTable, stage: int) -> dict[str, dict[str, ParameterRow]]:
    """Rows of a stage by the names of modules and of parameters in them."""
    found: dict[str, dict[str, ParameterRow]] = {}
    for row in table.parameters:
        if stage in row.stages:
            for name in (row.name, *row.aliases):
                owner, _, leaf = name.rpartition(".")
                found.setdefault(owner, {})[leaf] = row
    return found


def _experts_near(name: str, rows: dict[str, dict[str, ParameterRow]]) -> ParameterRow | None:
    """A parameter of dealt experts in a module, or else beside it: a router stands beside its experts."""
    for scope in (name, name.rpartition(".")[0]):
        for owner, held in rows.items():
            if owner == scope or owner.startswith(f"{scope}."):
                found = next((r for r in held.values() if r.style.cut is Cut.EXPERTS and r.dim is not None), None)
                if found is not None:
                    return found
    return None


def _head(module: nn.Module, table: ShardTable) -> nn.Module | None:
    """The module that makes logits: the one that the model names, else the last whose gathered output is as long as a
    cut vocabulary.
    """
    get_head = getattr(module, "get_output_embeddings", None)
    if get_head is not None:
        head = get_head()
        return head if isinstance(head, nn.Module) else None
    members = {member.name for group in table.groups if group.kind is UnitKind.VOCABULARY for member in group.members}
    gathered = [name for name, style in table.modules.items() if style.output is Output.GATHERED]
    heads = [
        name for name in gathered if (row := table.by_name.get(f"{name}.weight")) is not None and row.name in members
    ]
    return module.get_submodule(heads[-1]) if heads else None

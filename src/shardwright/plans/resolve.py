"""Resolve a plan against a model: patterns and units to one row per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from shardwright.plans.dataflow import Dataflow
from shardwright.plans.deal import Deal
from shardwright.plans.groups import UnitGroup
from shardwright.plans.patterns import matches, specificity
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.quantization import Quantization
from shardwright.plans.replicate import is_in, rows_without
from shardwright.plans.stages import assign_stages
from shardwright.plans.styles import (
    COLUMN_GATHERED,
    IDENTITY_EXPERT,
    REPLICATE,
    ROUTER,
    VOCABULARY,
    Cut,
    Input,
    Output,
    Style,
)
from shardwright.plans.table import ParameterRow, ShardTable


def resolve(
    module: nn.Module,
    plan: ParallelPlan,
    groups: Sequence[UnitGroup],
    *,
    tp: int = 1,
    pp: int = 1,
    pp_split: Sequence[int] | None = None,
    flow: Dataflow | None = None,
    quantization: Quantization | None = None,
) -> ShardTable:
    """The table of a model.

    Args:
        module: the model, on "meta" or not.
        plan: what is cut.
        groups: where, from `plans.units.unit_groups`.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        pp_split: layers per stage; None: balanced by bytes.
        flow: of the model's layers, if it is at hand.
        quantization: of its weights, which are then cut between quantized groups.

    Raises: PlanError if a plan cannot be carried out: more ranks than units, stages than layers, a cut along a
        dimension that a parameter does not have.
    """
    rows: list[ParameterRow] = []
    deal = Deal(groups, tp, quantization)
    for name, aliases, parameter, owner in parameters_of(module):
        pattern = next((p for n in (name, *aliases) if (p := matching_pattern(plan, n)) is not None), None)
        style = plan.styles[pattern] if pattern is not None else REPLICATE
        row: dict[str, Any] = {}
        dim = cut_dimension(owner, name.rpartition(".")[2], parameter.ndim, style) if tp > 1 else None
        if dim is not None and (part := deal.part((name, *aliases), dim, parameter.shape[dim], style)) is not None:
            row = {"dim": dim, "unit": part.unit, "ranges": part.ranges}
        if quantization is not None and name in quantization.inputs:
            row |= {"quantized": quantization.format, "input_dim": quantization.inputs[name][0]}
        rows.append(
            ParameterRow(
                name=name,
                aliases=aliases,
                shape=tuple(parameter.shape),
                element_bytes=parameter.element_size(),
                style=style,
                word=plan.tp[pattern] if pattern is not None else REPLICATE.name,
                matched_by=pattern,
                once=tp > 1 and style.is_row and dim is None and name.endswith("bias"),
                **row,
            )
        )
    whole = deal.held_whole(adders(module, plan))
    rows = rows_without(rows, whole)
    stages, rows = assign_stages(module, plan, rows, tp=tp, pp=pp, pp_split=pp_split, flow=flow)
    styles = module_styles(module, plan, rows) if tp > 1 else {}
    return ShardTable(
        plan=plan,
        tp=tp,
        pp=pp,
        parameters=tuple(rows),
        modules={name: style for name, style in styles.items() if not is_in(name, whole)},
        groups=tuple(groups),
        stages=stages,
        undealt=tuple(deal.undealt),
    )


def adders(module: nn.Module, plan: ParallelPlan) -> set[str]:
    """Modules that hold nothing that is cut, and add up what modules within them compute."""
    patterns = [p for p, style in plan.styles.items() if style.output is Output.SUMMED and style.cut is Cut.NONE]
    return {name for name, _ in module.named_modules() if any(matches(pattern, name) for pattern in patterns)}


def module_styles(module: nn.Module, plan: ParallelPlan, rows: Sequence[ParameterRow]) -> dict[str, Style]:
    """Styles of the modules that do something with their input or output.

    A module that a plan does not name, but shares a cut weight with one that it does (tied embeddings), gets the style
    that the cut asks for.
    """
    styles = {}
    for name, _ in module.named_modules():
        patterns = [pattern for pattern in plan.tp if matches(pattern, name)]
        if patterns and acts(style := plan.styles[max(patterns, key=specificity)]):
            styles[name] = style
    for row in rows:
        if row.dim == 0 and row.aliases:
            for name in (row.name, *row.aliases):
                owner = name.rpartition(".")[0]
                if owner in styles or any(matches(pattern, owner) for pattern in plan.tp):
                    continue
                is_embedding = isinstance(module.get_submodule(owner), nn.Embedding)
                styles[owner] = VOCABULARY if is_embedding else COLUMN_GATHERED
    return styles


def acts(style: Style) -> bool:
    """Whether a style does something at a module's input or output, or inside of it."""
    return style.input is not Input.SAME or style.output is not Output.SAME or style in (IDENTITY_EXPERT, ROUTER)


def parameters_of(module: nn.Module) -> list[tuple[str, tuple[str, ...], nn.Parameter, nn.Module]]:
    """Every parameter once: its first name, its other names, itself, and the module that holds it."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return [
        (names[0], tuple(names[1:]), parameter, module.get_submodule(names[0].rpartition(".")[0]))
        for parameter, names in found.values()
    ]


def matching_pattern(plan: ParallelPlan, name: str) -> str | None:
    """The pattern that decides over a parameter: one that names it, else one that names its module."""
    owner = name.rpartition(".")[0]
    found = [p for p in plan.tp if matches(p, name)] or [p for p in plan.tp if matches(p, owner)]
    return max(found, key=specificity, default=None)


def has_inputs_first(owner: nn.Module) -> bool:
    """Whether a module's weight is [inputs, outputs], as Transformers' Conv1D of GPT-2 has it."""
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")


def cut_dimension(owner: nn.Module, leaf: str, ndim: int, style: Style) -> int | None:
    """The dimension of a parameter that a style cuts; None if every rank holds all of it.

    Linear weights are [outputs, inputs], stacked experts [experts, outputs, inputs], convolutions [outputs, inputs,
    places]; a bias has outputs alone, those of stacked experts are [experts, outputs].
    """
    if ndim == 0 or style.cut is Cut.NONE:
        return None
    if style.cut in (Cut.VOCABULARY, Cut.EXPERTS):
        return 0
    if style.cut is Cut.EMBEDDING:
        return ndim - 1
    columns = style.is_column
    if ndim == 1:
        is_bias = leaf == "bias" or isinstance(owner, nn.Linear)
        return None if is_bias and not columns else 0
    if ndim == 2 and leaf.endswith("_bias"):
        return 1 if columns else None
    if isinstance(owner, nn.Conv1d):
        return 0 if columns else 1
    if has_inputs_first(owner):
        columns = not columns
    return ndim - 2 if columns else ndim - 1

"""Resolve a plan against a model: patterns and units to one row per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwright.plans.dataflow import Dataflow
from shardwright.plans.deal import Deal
from shardwright.plans.groups import Member, UnitGroup
from shardwright.plans.patterns import matches, specificity
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.quantization import Quantization, most_ranks
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
from shardwright.plans.table import ParameterRow, ShardTable, Undealt
from shardwright.plans.undealt import hold_whole


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

    Returns: every rank holds all of what has fewer units than there are ranks, if there are heads that can be dealt,
        and of what cannot be dealt without cutting quantized groups.
    Raises: PlanError if a plan cannot be carried out: more ranks than units of all heads, stages than layers, a cut
        along a dimension that a parameter does not have.
    """
    planned = [_planned(plan, tp, *found) for found in parameters_of(module)]
    undealt = _undealt(module, plan, groups, planned, tp, quantization)
    held = {name for each in undealt for name in each.modules}
    rows: list[ParameterRow] = []
    deal = Deal(groups, tp, quantization)
    for each in planned:
        name, shape, style, dim = each.names[0], tuple(each.parameter.shape), each.style, each.dim
        if any(is_in(n, held) for n in each.names):
            style, dim = REPLICATE, None
        row: dict[str, Any] = {}
        if dim is not None and (part := deal.part(each.names, dim, shape[dim], style)) is not None:
            row = {"dim": dim, "unit": part.unit, "ranges": part.ranges}
        if quantization is not None and name in quantization.inputs:
            row |= {"quantized": quantization.format, "input_dim": quantization.inputs[name][0]}
        rows.append(
            ParameterRow(
                name=name,
                aliases=each.names[1:],
                shape=shape,
                element_bytes=each.parameter.element_size(),
                style=style,
                word=plan.tp[each.pattern] if each.pattern is not None else REPLICATE.name,
                matched_by=each.pattern,
                once=tp > 1 and style.is_row and dim is None and name.endswith("bias"),
                **row,
            )
        )
    held |= deal.unplaced
    rows = rows_without(rows, deal.unplaced)
    stages, rows = assign_stages(module, plan, rows, tp=tp, pp=pp, pp_split=pp_split, flow=flow)
    styles = module_styles(module, plan, rows) if tp > 1 else {}
    return ShardTable(
        plan=plan,
        tp=tp,
        pp=pp,
        parameters=tuple(rows),
        modules={name: style for name, style in styles.items() if not is_in(name, held)},
        groups=tuple(groups),
        stages=stages,
        undealt=undealt,
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    """A parameter, and what the plan says of it."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    pattern: str | None
    style: Style
    dim: int | None
    """The dimension that is cut."""


def _planned(
    plan: ParallelPlan, tp: int, name: str, aliases: tuple[str, ...], parameter: nn.Parameter, owner: nn.Module
) -> _Planned:
    names = (name, *aliases)
    pattern = next((p for n in names if (p := matching_pattern(plan, n)) is not None), None)
    style = plan.styles[pattern] if pattern is not None else REPLICATE
    dim = cut_dimension(owner, name.rpartition(".")[2], parameter.ndim, style) if tp > 1 else None
    return _Planned(names, parameter, pattern, style, dim)


def _undealt(
    module: nn.Module,
    plan: ParallelPlan,
    groups: Sequence[UnitGroup],
    planned: Sequence[_Planned],
    tp: int,
    quantization: Quantization | None,
) -> tuple[Undealt, ...]:
    cut = {(name, each.dim) for each in planned if each.dim is not None for name in each.names}
    if not any(most_ranks(group, quantization) < tp for group in groups) or not cut:
        return ()
    styles = module_styles(module, plan, ())

    def is_cut(member: Member) -> bool:
        return (member.name, member.dim) in cut

    return hold_whole(module, groups, styles, is_cut, ranks=tp, quantization=quantization)


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

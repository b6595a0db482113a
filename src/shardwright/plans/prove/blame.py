"""Which entry of a plan is at fault, and what to write instead: found by trying.

Where a proof fails, the entries that decide over the module that differs, and over what is cut together with it, are
replaced one by one by what a right plan would say, and the proof is run again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.fit import Fit
from shardwright.plans.groups import UnitGroup, UnitKind
from shardwright.plans.patterns import generalize, matches
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.prove.judge import Failure
from shardwright.plans.prove.trial import Bench, Trial
from shardwright.plans.resolve import has_inputs_first, matching_pattern
from shardwright.plans.stack import find_stack
from shardwright.plans.styles import Cut, parse_style
from shardwright.plans.table import ParameterRow, ShardTable

PATIENCE_S = 20.0
"""How long fixes are tried."""

LINEAR_WORDS = ("colwise", "rowwise", "colwise_gather_output", "rowwise_split_input")
STACKED_WORDS = ("packed_colwise", "colwise", "rowwise", "grouped_gemm")
EMBEDDING_WORDS = ("embedding_rowwise",)
SUM_WORDS = ("moe_tp_experts",)


Edits = tuple[tuple[str, str | None], ...]
"""Entries and their new words; None: the entry is removed."""


@dataclass(frozen=True, slots=True)
class Blame:
    """What is likely to be at fault."""

    entry: str | None
    """Of the plan, or missing in it."""
    edits: Edits = ()
    """What to write instead; nothing if no way was found."""
    holds: bool = False
    """With that the proof holds. Else it gets past the module that differs, and fails later."""

    @property
    def fix(self) -> str | None:
        """The edits as lines for the plan."""
        lines = (f'remove "{entry}"' if word is None else f'"{entry}": "{word}"' for entry, word in self.edits)
        return ", ".join(lines) or None

    @property
    def cuts_less(self) -> bool:
        """Whether the only way that was found is to cut less, so that no entry says something wrong."""
        return all(word is None for _, word in self.edits)


@dataclass(frozen=True, slots=True)
class _Site:
    """A place for an entry: a module with parameters, a parameter, or a module that adds up what is in it."""

    entry: str
    """The pattern that is there, or that would be written there."""
    current: str | None
    right: str | None
    """What a right plan says, by what is cut together; None if that is not known."""
    words: tuple[str, ...]
    """What may be said there."""


def find_blame(bench: Bench, trial: Trial, failure: Failure) -> Blame:
    """Find the entry that is likely at fault.

    Args:
        bench: tries other plans.
        trial: that failed.
        failure: where.

    Returns: the entry, and the fix with which the proof holds; if there is none, one that gets past the failure.
    """
    module, plan, table = bench.subject.module, trial.plan, trial.table
    deadline = time.monotonic() + PATIENCE_S
    held = module.get_submodule(failure.module)
    block = failure.module if any(held.children()) else _scopes(failure.module)[0]
    end = max((i for i, call in enumerate(bench.subject.calls) if call.module == block), default=failure.place)
    past: Edits = ()
    candidates = [edits for edits in dict.fromkeys(_candidates(module, plan, table, failure)) if edits]
    for fitted in (Fit(trial.fitted.sizes), None):
        for edits in candidates:
            if time.monotonic() > deadline:
                break
            try:
                later = bench.try_plan(edited(plan, edits), fitted=fitted, whole=trial.whole).verdict.failure
            except PlanError:
                continue
            if later is None:
                return Blame(edits[0][0], edits, holds=True)
            if later.place > end and not past:
                past = edits
    if past:
        return Blame(past[0][0], past)
    near = (site.entry for scope in _scopes(failure.module) for site in _sites(module, plan, table, scope))
    return Blame(next(near, None))


def edited(plan: ParallelPlan, edits: Edits) -> ParallelPlan:
    """A plan with other entries."""
    tp = dict(plan.tp)
    for entry, word in edits:
        if word is None:
            tp.pop(entry, None)
        else:
            tp[entry] = word
    return replace(plan, tp=tp)


def _candidates(module: nn.Module, plan: ParallelPlan, table: ShardTable, failure: Failure) -> Iterator[Edits]:
    """Edits, the most plausible first."""
    own = _sites(module, plan, table, failure.module) if _is_leaf(module, failure.module) else []
    scopes = [_sites(module, plan, table, scope) for scope in _scopes(failure.module)]
    yield from (edits for site in own for edits in _right(site))
    for sites in scopes:
        others = [site for site in sites if site not in own]
        yield from (edits for site in others for edits in _right(site))
        together = tuple(edit for site in [*own, *others] for edits in _right(site) for edit in edits)
        if len(together) > 1:
            yield together
        yield from (edits for site in own for edits in _others(site))
        yield from (edits for site in others for edits in _others(site))
        for less in (_cut_with(module, plan, table, failure.module), sites):
            yield tuple((site.entry, None) for site in less if site.current is not None)


def _cut_with(module: nn.Module, plan: ParallelPlan, table: ShardTable, name: str) -> list[_Site]:
    """Places for entries of what is cut in the same units as a module's parameters, that of the module last."""
    inside = f"{name}."
    groups = [group for group in table.groups if any(m.name.startswith(inside) for m in group.members)]
    rows = [table.by_name[member.name] for group in groups for member in group.members]
    rows.sort(key=lambda row: row.name.startswith(inside))
    sites = [_parameter_site(module, plan, table, row, row.name) for row in rows if row.dim is not None]
    return list({site.entry: site for site in sites}.values())


def _right(site: _Site) -> Iterator[Edits]:
    """What a right plan says, if it says something else."""
    if site.right is not None and not _same(site.right, site.current):
        yield ((site.entry, site.right),)


def _others(site: _Site) -> Iterator[Edits]:
    for word in site.words:
        if not _same(word, site.current):
            yield ((site.entry, word),)
    if site.current is not None:
        yield ((site.entry, None),)


def _same(word: str, other: str | None) -> bool:
    """Whether two words mean the same where units say how features lie one after another."""
    if other is None:
        return False
    one, two = parse_style(word, where=""), parse_style(other, where="")
    return one == two or (one.is_column and two.is_column and (one.input, one.output) == (two.input, two.output))


def _scopes(name: str) -> list[str]:
    """Modules in which the fault may lie: the nearest first, not beyond the layer, and then the whole model."""
    levels = name.split(".") if name else []
    above = [".".join(levels[:depth]) for depth in range(len(levels), 0, -1)]
    numbered = next((i for i, scope in enumerate(above) if scope.rpartition(".")[2].isdecimal()), len(above) - 1)
    return [*above[1 : numbered + 1], *above[:1], ""] if len(above) > 1 else [*above, ""]


def _is_leaf(module: nn.Module, name: str) -> bool:
    held = module.get_submodule(name)
    return next(held.parameters(recurse=False), None) is not None


def _sites(module: nn.Module, plan: ParallelPlan, table: ShardTable, scope: str) -> list[_Site]:
    """Places for entries below a module, those at it first; of the whole model, those outside of layers."""
    found: dict[str, _Site] = {}
    inside = f"{scope}." if scope else ""
    for row in table.parameters:
        for name in (row.name, *row.aliases):
            if not name.startswith(inside) or (not scope and any(level.isdecimal() for level in name.split("."))):
                continue
            site = _parameter_site(module, plan, table, row, name)
            if site.entry not in found or found[site.entry].right is None:
                found[site.entry] = site
    for name, held in module.named_modules():
        if not (name == scope or name.startswith(inside)) or not name:
            continue
        pattern = next((p for p in plan.tp if matches(p, name)), None)
        stacked = any(p.ndim > 2 for p in held.parameters(recurse=False)) and not isinstance(held, nn.Conv1d)
        if (pattern is not None or stacked) and (pattern or _pattern(module, name)) not in found:
            entry = pattern or _pattern(module, name)
            found[entry] = _Site(entry, plan.tp.get(entry), None, SUM_WORDS)
    return list(found.values())


def _parameter_site(module: nn.Module, plan: ParallelPlan, table: ShardTable, row: ParameterRow, name: str) -> _Site:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    pattern = matching_pattern(plan, name)
    is_module = leaf in ("weight", "bias")
    if pattern is not None and not (is_module or matches(pattern, name)) and plan.styles[pattern].cut is Cut.NONE:
        pattern = None  # it is of the module that holds the parameter, and adds up what that gives
    entry = pattern or _pattern(module, owner_name if is_module else name)
    words: tuple[str, ...]
    if isinstance(owner, nn.Embedding):
        words = EMBEDDING_WORDS
    elif len(row.shape) < 2:
        words = ()
    else:
        words = LINEAR_WORDS if len(row.shape) == 2 and is_module else STACKED_WORDS
    return _Site(entry, plan.tp.get(entry), _right_word(module, table, row), words)


def _right_word(module: nn.Module, table: ShardTable, row: ParameterRow) -> str | None:
    """The style that goes with the units that a parameter is cut in; with those that the plan cuts most else by, if
    there are several ways.
    """
    if len(row.shape) < 2:
        return None
    owner = module.get_submodule(row.name.rpartition(".")[0])
    ways = [(group, member) for group in table.groups for member in group.members if member.name == row.name]
    if not ways:
        return None
    group, member = max(ways, key=lambda way: (_members_cut(way[0], table), way[0].kind is not UnitKind.EXPERTS))
    if group.kind is UnitKind.VOCABULARY:
        return "embedding_rowwise" if isinstance(owner, nn.Embedding) else "colwise_gather_output"
    if group.kind is UnitKind.EXPERTS:
        return "grouped_gemm"
    if member.dim != len(row.shape) - (1 if has_inputs_first(owner) else 2):
        return "rowwise"
    return "packed_colwise" if len(member.segments) > 1 and len(row.shape) > 2 else "colwise"


def _members_cut(group: UnitGroup, table: ShardTable) -> int:
    """How many of the dimensions of a group the plan cuts."""
    return sum(table.by_name[member.name].dim == member.dim for member in group.members)


def _pattern(module: nn.Module, name: str) -> str:
    """A name for the same in every layer."""
    stack = find_stack(module)
    layer = next((layer for layer in (stack.layers if stack else ()) if name.startswith(f"{layer}.")), None)
    if layer is None:
        return generalize(name)
    container, _, _ = layer.rpartition(".")
    return f"{generalize(container)}.*{generalize(name.removeprefix(layer))}".lstrip(".")

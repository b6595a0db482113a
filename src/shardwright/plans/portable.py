"""A plan in patterns and words that other engines carry out as they are: Transformers (v5) and vLLM.

They cut a dimension in equal parts, one for each rank, and change nothing in the code of a model. So where parts lie
one after another in one weight, heads are dealt out of order, or code asks attributes for its head counts, linears are
not cut in place: their columns are put together on every rank, and the rows behind them take their part of the whole.
What is no linear is held whole, but stacked experts, whose words Transformers knows.

Transformers looks entries up by a name in which numbered levels are `*`. vLLM takes the first entry that matches the
beginning of a name as a regular expression, and knows the words of linears alone.

Source: `distributed/mixin.py` and `distributed/tensor_parallel.py` of Transformers 5.23,
`model_executor/models/transformers/base.py` and `utils.py` of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.fit import fit
from shardwright.plans.groups import UnitGroup, UnitKind
from shardwright.plans.patterns import matches, specificity
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import resolve
from shardwright.plans.styles import (
    COLUMN,
    COLUMN_GATHERED,
    EMBEDDING,
    LOCAL_ROW,
    PACKED_COLUMN,
    REPLICATE,
    ROW,
    ROW_SPLIT,
    SUM,
    VOCABULARY,
    Style,
    parse_style,
)

SUM_OF_EXPERTS = "moe_tp_experts"
"""Transformers' word for experts that are cut: it runs them on their parts, and adds up what they give."""

LINEAR_IN_PLACE = {COLUMN: COLUMN, ROW: ROW, LOCAL_ROW: ROW}
"""Styles of linears that are cut in place, and what becomes of them: each adds up its own partial sums."""

PUT_TOGETHER = {nn.Linear: (COLUMN_GATHERED,), nn.Embedding: (VOCABULARY, EMBEDDING)}
"""Styles after which every rank has the whole output again, whatever becomes of other modules."""

Words = dict[str, str | None]
"""Qualified names of modules and parameters to words; None: held whole."""


def portable(plan: ParallelPlan, module: nn.Module, groups: Iterable[UnitGroup]) -> ParallelPlan:
    """An inferred plan as other engines can carry it out.

    Args:
        plan: inferred for the model.
        module: the model, on "meta" or not; stays as it is.
        groups: of the model, from `plans.units.unit_groups`.
    """
    words = _words(plan, module)
    cut = [group for group in groups if group.kind in (UnitKind.HEADS, UnitKind.FEATURES)]
    decided = _alone(module, words, cut)
    asking = _asking_for_sizes(plan, module, groups)
    for group in cut:
        decided |= _of_group(module, words, group, in_place=not any(_is_below(m.name, asking) for m in group.members))
    while torn := _torn_by_ties(module, decided):
        decided |= torn
    entries = _patterns(words, _sums(words, decided), cut)
    return replace(plan, tp=_as_first_match(module, entries))


def _words(plan: ParallelPlan, module: nn.Module) -> Words:
    """What a plan says of each module and parameter."""
    names = [name for name, _ in module.named_modules() if name]
    names += [name for name, _ in module.named_parameters(remove_duplicate=False)]
    found: Words = {}
    for name in names:
        pattern = max((p for p in plan.tp if matches(p, name)), key=specificity, default=None)
        found[name] = None if pattern is None else plan.tp[pattern]
    return found


def _entry_of(words: Words, parameter: str) -> str | None:
    """The name whose word says how a parameter is cut: its own, or its module's."""
    owner = parameter.rpartition(".")[0]
    return next((name for name in (parameter, owner) if words.get(name) is not None), None)


def _alone(module: nn.Module, words: Words, cut: Iterable[UnitGroup]) -> Words:
    """Names that are in no group of what is cut in place: what is put together where it ends, and what has no word."""
    grouped = {_entry_of(words, member.name) for group in cut for member in group.members}
    found: Words = {}
    for name, word in words.items():
        style = _style(word)
        held = module.get_submodule(name) if _is_module(module, name) else None
        if style is None:
            found[name] = None
        elif any(isinstance(held, kind) and style in styles for kind, styles in PUT_TOGETHER.items()):
            found[name] = word
        elif held is not None and style in (SUM, COLUMN_GATHERED):
            found[name] = None  # sums are decided with what they add up
        elif held is None and name not in grouped:
            found[name] = None  # a bias that one rank adds
    return found


def _of_group(module: nn.Module, words: Words, group: UnitGroup, *, in_place: bool) -> Words:
    """Words of a group: as they are, or put together where its columns end."""
    entries = {name for member in group.members if (name := _entry_of(words, member.name)) is not None}
    if all(_is_stack(module, words, group, name) for name in entries):
        return {name: _word_of_stack(words[name]) for name in entries}
    dims = {(member.name, member.dim) for member in group.members}
    plain = len(dims) == len(group.members) and all(len(m.segments) == 1 and m.span is None for m in group.members)
    styles = {name: _style(words[name]) for name in entries}
    owners = {name: module.get_submodule(name) if _is_module(module, name) else None for name in entries}
    in_place &= plain and all(isinstance(owner, nn.Linear) for owner in owners.values())
    in_place &= all(style in LINEAR_IN_PLACE for style in styles.values())
    made: Words = {}
    for name, style in styles.items():
        assert style is not None
        if not isinstance(owners[name], nn.Linear):
            made[name] = None
        elif in_place:
            made[name] = LINEAR_IN_PLACE[style].name
        else:
            made[name] = COLUMN_GATHERED.name if style.is_column else ROW_SPLIT.name
    return made


def _is_stack(module: nn.Module, words: Words, group: UnitGroup, name: str) -> bool:
    """Whether a name is that of stacked matrices of experts, in a module that adds up what they give, and nothing else.

    Their columns may be of two kinds, in halves.
    """
    owner = name.rpartition(".")[0]
    if _is_module(module, name) or _style(words.get(owner)) != SUM or module.get_parameter(name).ndim != 3:
        return False
    members = [member for member in group.members if member.name == name]
    beside = [n for n, word in words.items() if word is not None and n.startswith(f"{owner}.")]
    if len(members) != 1 or members[0].span is not None or not {*beside} <= {m.name for m in group.members}:
        return False
    lengths = {stop - start for start, stop in members[0].segments}
    kinds = 2 if _style(words[name]) == PACKED_COLUMN else 1
    return len(members[0].segments) == kinds and len(lengths) == 1


def _torn_by_ties(module: nn.Module, decided: Words) -> Words:
    """Modules that share a parameter which not all of them would cut: none of them does."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name.rpartition(".")[0])
    torn = [names for names in owners.values() if any(decided.get(name) is None for name in names)]
    return {name: None for names in torn for name in names if len(names) > 1 and decided.get(name) is not None}


def _word_of_stack(word: str | None) -> str | None:
    return ROW.name if _style(word) == LOCAL_ROW else word


def _sums(words: Words, decided: Words) -> Words:
    """With the modules that add up what their stacked experts give."""
    owners = {name.rpartition(".")[0] for name, word in decided.items() if word is not None}
    sums = {name: SUM_OF_EXPERTS for name in owners if _style(words.get(name)) == SUM}
    return decided | sums


def _asking_for_sizes(plan: ParallelPlan, module: nn.Module, groups: Iterable[UnitGroup]) -> set[str]:
    """Modules whose code asks for sizes of the whole, so that it does not run on parts without being fitted to them."""
    try:
        found = fit(module, resolve(module, plan, list(groups), tp=2))
    except PlanError:  # something has one unit
        return set()
    return {size.module for size in found.sizes} | {name for misfit in found.misfits for name in misfit.modules}


def _patterns(words: Words, decided: Words, cut: Iterable[UnitGroup]) -> dict[str, str]:
    """Entries by the names under which Transformers looks them up.

    What would have two words under one name is held whole, with all of its group.
    """
    together = [{_entry_of(words, m.name) for m in group.members} - {None} for group in cut]
    decided = dict(decided)
    while True:
        by_pattern: dict[str, set[str | None]] = defaultdict(set)
        for name, word in decided.items():
            by_pattern[_looked_up(name)].add(word)
        torn = {name for name, word in decided.items() if word is not None and len(by_pattern[_looked_up(name)]) > 1}
        if not torn:
            return {pattern: word for pattern, (word,) in by_pattern.items() if word is not None}
        torn |= {name for names in together if names & torn for name in names if name is not None}
        decided |= dict.fromkeys(torn)
        decided |= {name: None for name, word in decided.items() if word == SUM_OF_EXPERTS and _holds(name, torn)}


def _looked_up(name: str) -> str:
    """The name under which Transformers looks for an entry: of two numbered levels in a row, the second stays."""
    return re.sub(r"\.\d+(\.|$)", r".*\1", name)


def _as_first_match(module: nn.Module, entries: Mapping[str, str]) -> dict[str, str]:
    """Entries in an order in which the first that matches the beginning of a linear's name is the right one.

    Linears that have none, and begin as others do, are named as replicated.
    """
    linears = {name: _looked_up(name) for name, held in module.named_modules() if isinstance(held, nn.Linear)}

    def right(ordered: Mapping[str, str], name: str) -> bool:
        first = next((word for pattern, word in ordered.items() if re.match(f"model.{pattern}", f"model.{name}")), None)
        return (first or REPLICATE.name) == ordered.get(linears[name], REPLICATE.name)

    made = dict(entries)
    if all(right(made, name) for name in linears):
        return made
    by_length = {p: made[p] for p in sorted(made, key=lambda p: (-p.count("."), -len(p)))}
    wrong = [pattern for name, pattern in linears.items() if not right(by_length, name) and pattern not in made]
    made |= dict.fromkeys(wrong, REPLICATE.name)
    return {p: made[p] for p in sorted(made, key=lambda p: (-p.count("."), -len(p)))}


def _style(word: str | None) -> Style | None:
    return None if word is None else parse_style(word, where="the plan")


def _is_module(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_below(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter is in one of some modules."""
    return any(not holder or name.startswith(f"{holder}.") for holder in modules)


def _holds(name: str, names: Iterable[str]) -> bool:
    """Whether one of some names is directly in a module."""
    return any(other.rpartition(".")[0] == name for other in names)

"""Modules that are fitted to parts of their parameters: what is cut together, alike ones once."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shardwright.plans.groups import UnitGroup, UnitKind
from shardwright.plans.rehearsal import table_below
from shardwright.plans.stack import find_stack
from shardwright.plans.styles import Cut, Output
from shardwright.plans.table import ShardTable

NUM_TOKENS = (7, 11, 13, 17, 19, 23)
"""Lengths of the rehearsed sequence to choose from: one that is no size of the model, lest sizes be mixed up."""


@dataclass(slots=True)
class Kind:
    """Modules that are alike but for their weights."""

    scopes: list[str] = field(default_factory=list)
    groups: list[UnitGroup] = field(default_factory=list)
    """Those cut in the first of them."""
    sizes: set[int] = field(default_factory=set)
    """Lengths of the dimensions that are cut."""


def kinds_of(module: nn.Module, table: ShardTable) -> Iterator[Kind]:
    """Modules that hold cut parameters, the largest where one is in another, alike ones together."""
    scopes: dict[str, list[UnitGroup]] = defaultdict(list)
    grouped: set[str] = set()
    stack = find_stack(module)
    layers = frozenset(stack.layers if stack is not None else ())

    def layer_of(name: str) -> str:
        levels = name.split(".")
        return next((above for d in range(len(levels)) if (above := ".".join(levels[:d])) in layers), "")

    for group in table.groups:
        rows = [(member, table.by_name.get(member.name)) for member in group.members]
        names = [member.name for member, row in rows if row is not None and row.dim == member.dim]
        grouped.update(names)
        if group.kind is not UnitKind.VOCABULARY:
            for _, held in itertools.groupby(sorted(names, key=layer_of), layer_of):  # layers may share keys and values
                scopes[_scope(list(held), table)].append(group)
    for row in table.parameters:
        is_lookup = row.style.cut in (Cut.VOCABULARY, Cut.EMBEDDING)
        if row.dim is not None and not is_lookup and not grouped & {row.name, *row.aliases}:
            scopes.setdefault(_scope([row.name, f"{row.name.rpartition('.')[0].rpartition('.')[0]}."], table), [])
    scopes.pop("", None)
    # In the order in which they probably run
    outer = [s for s, _ in module.named_modules() if s in scopes and not any(s.startswith(f"{o}.") for o in scopes)]
    kinds: dict[Any, Kind] = {}
    for scope in outer:
        groups = [g for s, held in scopes.items() if s == scope or s.startswith(f"{scope}.") for g in held]
        below = table_below(table, scope)
        rows_key = tuple((r.name, r.shape, r.dim, r.ranges) for r in below.parameters)
        key = type(module.get_submodule(scope)), rows_key, tuple(below.modules.items())
        kind = kinds.setdefault(
            key, Kind(groups=groups, sizes={r.shape[r.dim] for r in below.parameters if r.dim is not None})
        )
        kind.scopes.append(scope)
    yield from kinds.values()


def rehearsed_length(kinds: list[Kind]) -> int:
    """Tokens of a rehearsal: a number that is no size of what is cut."""
    taken = {size for kind in kinds for size in kind.sizes} | {g.units for kind in kinds for g in kind.groups}
    return next((n for n in NUM_TOKENS if n not in taken), NUM_TOKENS[-1])


def _scope(names: list[str], table: ShardTable) -> str:
    """The smallest module in which parameters are cut and their sum is made: "" if that is the whole model."""
    levels = names[0].split(".")[:-1]
    while not all(name.split(".")[: len(levels)] == levels for name in names):
        levels.pop()
    sums = [
        depth
        for depth in range(1, len(levels))
        if (style := table.modules.get(".".join(levels[:depth]))) is not None
        and style.output is Output.SUMMED
        and style.cut is Cut.NONE
    ]
    return ".".join(levels[: sums[0]] if sums else levels)

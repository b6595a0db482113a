"""Fit a model's code to parts of its parameters: which attributes have to say what a rank has, and what cannot be cut.

Code that takes sizes from its tensors runs on a part as on the whole. Other code asks attributes for head counts and
widths. Which of them must change, names do not say for sure: a head count may equal a head size. So every module whose
parameters are cut is rehearsed: whole, and as the ranks would run it, with ever more of the attributes changed that its
code reads and whose value is one of the sizes that are cut. The first choice under which the ranks together give what
the whole gives is taken. If there is none (code that computes sizes of whole tensors, or something else that depends on
the number of a head), it is not cut at all.
"""

from __future__ import annotations

import itertools
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.plans.cut import cut
from shardwright.plans.groups import UnitGroup, UnitKind, ranges_of
from shardwright.plans.reads import changeable_reads, read_attribute
from shardwright.plans.rehearsal import Call, difference, rehearse, table_below, with_made_up_weights
from shardwright.plans.sizes import LocalSize
from shardwright.plans.styles import Cut, Output
from shardwright.plans.table import ShardTable

MOST_TRIALS = 200
"""Choices of attributes that are tried for one kind of module."""

TOLERANCE = 1e-4
"""Of the largest difference to the largest value. Rounding gives some 1e-6, a wrong head some 1e-1."""

NUM_TOKENS = (7, 11, 13, 17, 19, 23)
"""Lengths of the rehearsed sequence to choose from: one that is no size of the model, lest sizes be mixed up."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """Modules of one kind whose parameters cannot be cut."""

    modules: tuple[str, ...]
    """Qualified names of all of the kind."""
    reason: str
    """What went wrong, and how to write the code so that it can be cut."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What the code of a model asks for to run on parts of its parameters."""

    sizes: tuple[LocalSize, ...] = ()
    misfits: tuple[Misfit, ...] = ()


@dataclass(slots=True)
class _Kind:
    """Modules that are alike but for their weights."""

    scopes: list[str] = field(default_factory=list)
    groups: list[UnitGroup] = field(default_factory=list)
    """Those cut in the first of them."""


def fit(module: nn.Module, table: ShardTable) -> Fit:
    """Find the attributes that have to change for a model to run as a table cuts it.

    Args:
        module: the whole model, with weights or on "meta"; left as it is.
        table: its plan, resolved.

    Returns: the same on every rank.
    """
    kinds = list(_kinds(module, table)) if table.tp > 1 else []
    if not kinds:
        return Fit()
    taken = {size for kind in kinds for group in kind.groups for size in _local_sizes(group, table)}
    num_tokens = next((n for n in NUM_TOKENS if n not in taken), NUM_TOKENS[-1])
    try:
        calls = rehearse(module, [kind.scopes[0] for kind in kinds], num_tokens=num_tokens)
    except Exception as exc:  # of the model's code
        reason = f"its code cannot be tried out on a few tokens: {type(exc).__name__}: {_first_line(exc)}"
        return Fit(misfits=tuple(Misfit(tuple(kind.scopes), reason) for kind in kinds))
    sizes: list[LocalSize] = []
    misfits: list[Misfit] = []
    for kind in kinds:
        call = calls.get(kind.scopes[0])
        if call is None:
            misfits.append(Misfit(tuple(kind.scopes), "the forward pass of the model does not call it"))
            continue
        found = _Trials(module, table, kind, call).search()
        if isinstance(found, str):
            misfits.append(Misfit(tuple(kind.scopes), found))
        else:
            sizes += [replace(size, module=_below(scope, size.module)) for scope in kind.scopes for size in found]
    return Fit(tuple(sizes), tuple(misfits))


class _Trials:
    """Runs of one module, cut, with some of its attributes changed."""

    def __init__(self, module: nn.Module, table: ShardTable, kind: _Kind, call: Call) -> None:
        self.name = kind.scopes[0]
        self.instances = [module.get_submodule(scope) for scope in kind.scopes]
        self.groups = kind.groups
        self.whole_table = table
        self.table = table_below(table, self.name)
        self.call = call

    def search(self) -> tuple[LocalSize, ...] | str:
        """The fewest attributes to change, named below the module; or the reason why it cannot be cut."""
        whole = with_made_up_weights(self.instances[0])
        reads = changeable_reads(whole)
        try:
            expected = self.call.repeat(whole)
        except Exception as exc:
            return f"its code cannot be tried out alone: {type(exc).__name__}: {_first_line(exc)}"
        if not expected.isfinite().all() or not expected.any():
            return "its code cannot be tried out: with made-up weights it gives no numbers"
        first = self._problem((), expected)
        if first is None:
            return ()
        for trial in itertools.islice(self._choices(reads), MOST_TRIALS):
            if self._problem(trial, expected) is None:
                return trial
        return first

    def _problem(self, sizes: tuple[LocalSize, ...], expected: Tensor) -> str | None:
        """What is wrong with the outputs of the ranks; None if they are what the whole module gives."""
        from shardwright.plans.prove.threads import run_ranks  # whose room imports this module

        def run(collectives: Collectives) -> Tensor:
            part = with_made_up_weights(self.instances[0])
            cut(part, self.table, stage=0, collectives=collectives, sizes=sizes)
            return self.call.repeat(part)

        try:
            with torch.no_grad():
                outputs = run_ranks(self.table.tp, run)
        except Exception as exc:  # of the model's code
            return _explained(exc, self.instances[0])
        worst = max(difference(output, expected) for output in outputs)
        if worst <= TOLERANCE:
            return None
        return (
            f"its code runs on parts of its parameters but gives another output (by {worst:.0%}): something in "
            f"{type(self.instances[0]).__name__} depends on how many heads or features there are, or which"
        )

    def _choices(self, reads: dict[tuple[str, str], Any]) -> Iterator[tuple[LocalSize, ...]]:
        """Sets of changes, small ones first."""
        options: list[list[LocalSize]] = []
        local: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for group in self.groups:
            for whole, parts in _local_sizes(group, self.whole_table).items():
                local[whole] += [part for part in parts if part not in local[whole]]
        for (name, attribute), value in reads.items():
            if self._is_the_same_everywhere(name, attribute, value):
                changed = [LocalSize(name, attribute, values) for values in _changed(value, local)]
                if changed:
                    options.append(changed)
        for count in range(1, len(options) + 1):
            for chosen in itertools.combinations(options, count):
                yield from itertools.product(*chosen)

    def _is_the_same_everywhere(self, name: str, attribute: str, value: Any) -> bool:
        """Whether all modules of the kind have the same value: a layer's number is no size."""
        return all(read_attribute(held.get_submodule(name), attribute) == value for held in self.instances)


def _kinds(module: nn.Module, table: ShardTable) -> Iterator[_Kind]:
    """Modules that hold cut parameters, the largest where one is in another, alike ones together."""
    cut_groups: dict[str, list[UnitGroup]] = defaultdict(list)
    for group in table.groups:
        rows = [(member, table.by_name.get(member.name)) for member in group.members]
        names = [member.name for member, row in rows if row is not None and row.dim == member.dim]
        if names and group.kind is not UnitKind.VOCABULARY and (scope := _scope(names, table)):
            cut_groups[scope].append(group)
    outer = [s for s in cut_groups if not any(s.startswith(f"{other}.") for other in cut_groups)]
    kinds: dict[Any, _Kind] = {}
    for scope in outer:
        groups = [g for s, held in cut_groups.items() if s == scope or s.startswith(f"{scope}.") for g in held]
        below = table_below(table, scope)
        held = module.get_submodule(scope)
        rows_key = tuple((r.name, r.shape, r.dim, r.ranges) for r in below.parameters)
        key = type(held), rows_key, tuple(below.modules.items())
        kind = kinds.setdefault(key, _Kind())
        kind.scopes.append(scope)
        kind.groups = kind.groups or groups
    yield from kinds.values()


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


def _local_sizes(group: UnitGroup, table: ShardTable) -> dict[int, list[tuple[int, ...]]]:
    """Sizes of the whole that code may ask for, and what each may be on the ranks."""
    pieces = group.pieces(table.tp)
    found: dict[int, list[tuple[int, ...]]] = defaultdict(list)

    def add(whole: int, parts: tuple[int, ...]) -> None:
        if parts not in found[whole]:
            found[whole].append(parts)

    for member in group.members:
        row = table.by_name.get(member.name)
        if row is None or row.dim != member.dim:
            continue
        ranges = [ranges_of(member, group.units, piece) for piece in pieces]
        size = (member.segments[0][1] - member.segments[0][0]) // member.units
        units = tuple((held[0][1] - held[0][0]) // size for held in ranges)
        for number, (start, stop) in enumerate(member.segments):
            add(stop - start, tuple(held[number][1] - held[number][0] for held in ranges))
        add(
            sum(stop - start for start, stop in member.segments),
            tuple(sum(stop - start for start, stop in held) for held in ranges),
        )
        if group.kind is not UnitKind.FEATURES:
            owned = tuple(stop - start for start, stop in pieces)
            add(group.units, owned)
            add(member.units, units)
            add(group.units // member.units, tuple(own // held for own, held in zip(owned, units, strict=True)))
    return {whole: parts for whole, parts in found.items() if whole > 1 or len(parts) > 1}


def _changed(value: Any, local: dict[int, list[tuple[int, ...]]]) -> Iterator[tuple[Any, ...]]:
    """What an attribute may be on the ranks: an int, or a list or tuple of ints, some of which are cut."""
    if isinstance(value, int):
        yield from (parts for parts in local.get(value, ()) if set(parts) != {value})
        return
    choices = [[*local.get(item, ()), None] for item in value]
    for chosen in itertools.islice(itertools.product(*choices), MOST_TRIALS):
        if any(parts is not None for parts in chosen):
            rows = [parts or itertools.repeat(item) for parts, item in zip(chosen, value, strict=True)]
            ranks = len(next(parts for parts in chosen if parts is not None))
            columns = [list(itertools.islice(row, ranks)) for row in rows]
            yield tuple(type(value)(items) for items in zip(*columns, strict=True))


def _below(scope: str, name: str) -> str:
    return f"{scope}.{name}" if name else scope


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [""])[0][:160]


def _explained(exc: BaseException, module: nn.Module) -> str:
    """What went wrong on a part, at which line of the model's code, and what to write there."""
    own = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not {"torch", "shardwright"} & set(Path(frame.filename).parts)
    ]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno} `{own[-1].line}`" if own else type(module).__name__
    return (
        f"{place} does not run on a part of its parameters ({_first_line(exc)}): let sizes follow from the tensor, as "
        "in `view(*x.shape[:-1], -1, self.head_dim)`, or from an attribute that counts heads"
    )

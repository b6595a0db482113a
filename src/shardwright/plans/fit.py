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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.plans.cut import cut
from shardwright.plans.groups import UnitGroup, UnitKind, ranges_of
from shardwright.plans.reads import changeable_reads, read_attribute
from shardwright.plans.rehearsal import (
    Call,
    difference,
    first_outputs,
    rehearse,
    table_below,
    with_made_up_weights,
)
from shardwright.plans.replicate import is_in, without
from shardwright.plans.sizes import LocalSize
from shardwright.plans.stack import find_stack
from shardwright.plans.styles import Cut, Output
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import run_ranks

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


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why a trial failed."""

    reason: str
    runs: bool
    """The code runs, and gives another output."""


@dataclass(slots=True)
class _Kind:
    """Modules that are alike but for their weights."""

    scopes: list[str] = field(default_factory=list)
    groups: list[UnitGroup] = field(default_factory=list)
    """Those cut in the first of them."""
    sizes: set[int] = field(default_factory=set)
    """Lengths of the dimensions that are cut."""


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
    num_tokens = _num_tokens(kinds)
    try:
        calls = rehearse(module, [kind.scopes[0] for kind in kinds], num_tokens=num_tokens)
    except Exception as exc:  # of the model's code
        reason = f"its code cannot be tried out on a few tokens: {type(exc).__name__}: {_first_line(exc)}"
        return Fit(misfits=tuple(Misfit(tuple(kind.scopes), reason) for kind in kinds))
    sizes: list[LocalSize] = []
    reasons: dict[str, str] = {}
    for kind in kinds:
        first, call = kind.scopes[0], calls.get(kind.scopes[0])
        found = _Trials(module, table, kind, call).search() if call is not None else "nothing calls it"
        if isinstance(found, str):
            reasons[first] = found
        else:
            sizes += [replace(size, module=_below(scope, size.module)) for scope in kind.scopes for size in found]
    for kind in kinds:  # it may need what modules need that it is cut together with
        alike = [k for k in kinds if k.scopes[0] not in reasons and any(group in k.groups for group in kind.groups)]
        if kind.scopes[0] in reasons and alike:
            sizes += [
                replace(size, module=_below(scope, size.module[len(alike[0].scopes[0]) + 1 :]))
                for scope in kind.scopes
                for size in sizes
                if is_in(size.module, alike[0].scopes[:1])
            ]
    misfits = _settle(module, table, kinds, sizes, reasons, num_tokens) if reasons else ()
    held = {name for misfit in misfits for name in misfit.modules}
    return Fit(tuple(size for size in sizes if not is_in(size.module, held)), misfits)


def _settle(
    module: nn.Module,
    table: ShardTable,
    kinds: list[_Kind],
    sizes: list[LocalSize],
    reasons: dict[str, str],
    num_tokens: int,
) -> tuple[Misfit, ...]:
    """Decide what is not cut, where something went wrong when it was tried out alone.

    It may have been given something whole that another module, cut, would give it in parts; and what is not cut may
    need others whole in turn. So the model is run with all of its parts: the first module whose output is wrong is
    taken back, with what is cut together with it, until nothing is wrong.
    """
    left, misfits = list(kinds), list[Misfit]()
    while left:
        held = {name for misfit in misfits for name in misfit.modules}
        used = [size for size in sizes if not is_in(size.module, held)]
        wrong = _first_wrong(module, without(table, held), [kind.scopes[0] for kind in kinds], used, num_tokens)
        if wrong is None:
            break
        blamed = [kind for kind in left if kind.scopes[0] == wrong]
        together = [
            kind for kind in left if kind not in blamed and any(g in b.groups for b in blamed for g in kind.groups)
        ]
        for kind in (*blamed, *together) or left:
            reason = reasons.get(kind.scopes[0], f"it is used together with {wrong}, which cannot be cut")
            misfits.append(Misfit(tuple(kind.scopes), reason))
            left.remove(kind)
    return tuple(misfits)


def _first_wrong(
    module: nn.Module, table: ShardTable, names: list[str], sizes: list[LocalSize], num_tokens: int
) -> str | None:
    """The first of some modules whose output is not that of the whole model, or that is not reached, when all ranks run
    the model together; None if all are right.
    """
    one_stage = replace(table, pp=1, parameters=tuple(replace(row, stages=(0,)) for row in table.parameters))
    expected: dict[str, Tensor] = {}
    outputs: list[dict[str, Tensor]] = [{} for _ in range(table.tp)]

    def run(collectives: Collectives) -> None:
        part = with_made_up_weights(module)
        cut(part, one_stage, stage=0, collectives=collectives, sizes=sizes)
        first_outputs(part, names, outputs[collectives.rank], num_tokens=num_tokens)

    with suppress(Exception):  # of the model's code: outputs end there
        first_outputs(with_made_up_weights(module), names, expected, num_tokens=num_tokens)
        run_ranks(table.tp, run)

    def is_right(name: str) -> bool:
        return name in expected and all(
            name in found and difference(found[name], expected[name]) <= TOLERANCE for found in outputs
        )

    in_order = [*expected, *(name for name in names if name not in expected)]
    return next((name for name in in_order if not is_right(name)), None)


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
        problems: list[_Problem] = []
        for trial in itertools.islice(itertools.chain([()], self._choices(reads)), MOST_TRIALS):
            if (problem := self._problem(trial, expected)) is None:
                return trial
            problems.append(problem)
        return next((p for p in problems if p.runs), problems[0]).reason

    def _problem(self, sizes: tuple[LocalSize, ...], expected: Tensor) -> _Problem | None:
        """What is wrong with the outputs of the ranks; None if they are what the whole module gives."""

        def run(collectives: Collectives) -> Tensor:
            part = with_made_up_weights(self.instances[0])
            cut(part, self.table, stage=0, collectives=collectives, sizes=sizes)
            return self.call.repeat(part)

        try:
            with torch.no_grad():
                outputs = run_ranks(self.table.tp, run)
        except Exception as exc:  # of the model's code
            return _Problem(_explained(exc, self.instances[0]), runs=False)
        if any(output.shape != expected.shape for output in outputs):
            shapes = ", ".join(str(list(output.shape)) for output in outputs)
            return _Problem(f"its output is {shapes} on the ranks, and {list(expected.shape)} as a whole", runs=False)
        worst = max(difference(output, expected) for output in outputs)
        if worst <= TOLERANCE:
            return None
        reason = (
            f"its code runs on parts of its parameters but gives another output (off by {worst:.0%}): something in "
            f"{type(self.instances[0]).__name__} depends on how many heads or features there are, or which"
        )
        return _Problem(reason, runs=True)

    def _choices(self, reads: dict[tuple[str, str], Any]) -> Iterator[tuple[LocalSize, ...]]:
        """Sets of changes, small ones first."""
        options: list[list[LocalSize]] = []
        local: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for whole, parts in itertools.chain(
            *(_group_sizes(group, self.whole_table) for group in self.groups),
            (
                (row.shape[row.dim], tuple(row.pieces(self.table.tp)))
                for row in self.table.parameters
                if row.dim is not None
            ),
        ):
            if parts not in local[whole]:
                local[whole].append(parts)
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
    kinds: dict[Any, _Kind] = {}
    for scope in outer:
        groups = [g for s, held in scopes.items() if s == scope or s.startswith(f"{scope}.") for g in held]
        below = table_below(table, scope)
        rows_key = tuple((r.name, r.shape, r.dim, r.ranges) for r in below.parameters)
        key = type(module.get_submodule(scope)), rows_key, tuple(below.modules.items())
        kind = kinds.setdefault(
            key, _Kind(groups=groups, sizes={r.shape[r.dim] for r in below.parameters if r.dim is not None})
        )
        kind.scopes.append(scope)
    yield from kinds.values()


def _num_tokens(kinds: list[_Kind]) -> int:
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


def _cut_sizes(table: ShardTable) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Lengths of the dimensions that are cut, each with what it is on the ranks."""
    for row in table.parameters:
        if row.dim is not None:
            yield row.shape[row.dim], tuple(row.pieces(table.tp))


def _group_sizes(group: UnitGroup, table: ShardTable) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Sizes of the whole that code may ask for, each with what it may be on the ranks."""
    pieces = group.pieces(table.tp)
    owned = tuple(stop - start for start, stop in pieces)
    if group.kind is not UnitKind.FEATURES:
        yield group.units, owned
    for member in group.members:
        row = table.by_name.get(member.name)
        if row is None or row.dim != member.dim:
            continue
        held = [ranges_of(member, group.units, piece) for piece in pieces]
        for number, (start, stop) in enumerate(member.segments):
            yield stop - start, tuple(ranges[number][1] - ranges[number][0] if ranges else 0 for ranges in held)
        if group.kind is not UnitKind.FEATURES and all(held):
            size = (member.segments[0][1] - member.segments[0][0]) // member.units
            units = tuple((ranges[0][1] - ranges[0][0]) // size for ranges in held)
            yield member.units, units
            yield group.units // member.units, tuple(own // unit for own, unit in zip(owned, units, strict=True))


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

"""Try a module out, cut, with more and more of its attributes changed, until the ranks give what the whole gives."""

from __future__ import annotations

import itertools
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel_views import KnownViews, LearnedViews, Place
from shardwright.plans.cut import cut
from shardwright.plans.fit_kinds import Kind
from shardwright.plans.groups import UnitGroup, UnitKind, ranges_of
from shardwright.plans.reads import changeable_reads, read_attribute
from shardwright.plans.rehearsal import Call, difference, table_below, with_made_up_weights
from shardwright.plans.sizes import Local, LocalSize, LocalViewSizes, LocalWidth
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import run_ranks

MOST_TRIALS = 200
"""Choices of attributes that are tried for one kind of module."""

TOLERANCE = 1e-4
"""Of the largest difference to the largest value. Rounding gives some 1e-6, a wrong head some 1e-1."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why a trial failed."""

    reason: str
    runs: bool
    """The code runs, and gives another output."""


class Trials:
    """Runs of one module, cut, with some of its attributes changed."""

    def __init__(self, module: nn.Module, table: ShardTable, kind: Kind, call: Call) -> None:
        self.name = kind.scopes[0]
        self.instances = [module.get_submodule(scope) for scope in kind.scopes]
        self.groups = kind.groups
        self.whole_table = table
        self.table = table_below(table, self.name)
        self.call = call

    def search(self) -> tuple[Local, ...] | str:
        """The fewest attributes to change, named below the module; or the reason why it cannot be cut."""
        whole = with_made_up_weights(self.instances[0])
        reads = changeable_reads(whole)
        try:
            expected = self.call.repeat(whole)
        except Exception as exc:
            return f"its code cannot be tried out alone: {type(exc).__name__}: {first_line(exc)}"
        if not expected.isfinite().all() or not expected.any():
            return "its code cannot be tried out: with made-up weights it gives no numbers"
        local = self._local_sizes()
        options = self._options(reads, local)
        problems: list[_Problem] = []
        for trial in itertools.islice(_choices(options), MOST_TRIALS):
            if (problem := self._problem(trial, expected)) is None:
                return trial
            problems.append(problem)
        singles = [(), *((size,) for option in options for size in option)]
        for trial in itertools.islice(self._with_views(singles, local, expected), MOST_TRIALS):
            if self._problem(trial, expected) is None:
                return trial
        return next((p for p in problems if p.runs), problems[0]).reason

    def _problem(self, sizes: tuple[Local, ...], expected: Tensor) -> _Problem | None:
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

    def _local_sizes(self) -> dict[int, list[tuple[int, ...]]]:
        """Sizes of the whole that code may ask for, each with what it may be on the ranks."""
        local: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        group_sizes = (_group_sizes(group, self.whole_table) for group in self.groups)
        for whole, parts in itertools.chain(*group_sizes, _cut_sizes(self.table)):
            if parts not in local[whole]:
                local[whole].append(parts)
        return dict(local)

    def _options(
        self, reads: dict[tuple[str, str], Any], local: dict[int, list[tuple[int, ...]]]
    ) -> list[Sequence[Local]]:
        """What may have to change, each with all that it may have to be."""
        options: list[Sequence[Local]] = []
        for (name, attribute), value in reads.items():
            if self._is_the_same_everywhere(name, attribute, value):
                changed = [LocalSize(name, attribute, values) for values in _changed(value, local)]
                if changed:
                    options.append(changed)
        width = self.call.width()
        if width is not None:
            options.append([LocalWidth("", width, parts) for parts in _changed(width, local)])
        return options

    def _with_views(
        self, others: Iterable[tuple[Local, ...]], local: dict[int, list[tuple[int, ...]]], expected: Tensor
    ) -> Iterator[tuple[Local, ...]]:
        """Changes together with views whose sizes are made to fit, in ever other ways where there are several."""
        for sizes in others:
            preferences: list[dict[Place, int]] = [{}]
            for preferred in preferences:
                learned = [
                    LearnedViews(
                        candidates={whole: tuple({p[rank] for p in parts}) for whole, parts in local.items()},
                        preferred=preferred,
                    )
                    for rank in range(self.table.tp)
                ]
                self._problem((*sizes, LocalViewSizes("", tuple(learned))), expected)
                if not any(views.at for views in learned):
                    break
                yield (*sizes, LocalViewSizes("", tuple(KnownViews(views.at) for views in learned)))
                ways = {place: max(v.ways.get(place, 0) for v in learned) for v in learned for place in v.ways}
                preferences += [
                    {**preferred, place: way}
                    for place, count in ways.items()
                    if place not in preferred and len(preferences) < MOST_TRIALS
                    for way in range(1, count)
                ]

    def _is_the_same_everywhere(self, name: str, attribute: str, value: Any) -> bool:
        """Whether all modules of the kind have the same value: a layer's number is no size."""
        return all(read_attribute(held.get_submodule(name), attribute) == value for held in self.instances)


def _choices(options: list[Sequence[Local]]) -> Iterator[tuple[Local, ...]]:
    """Sets of changes, none first, then small ones."""
    for count in range(len(options) + 1):
        for chosen in itertools.combinations(options, count):
            yield from itertools.product(*chosen)


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


def first_line(exc: BaseException) -> str:
    """The beginning of what an exception says."""
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
        f"{place} does not run on a part of its parameters ({first_line(exc)}): let sizes follow from the tensor, as "
        "in `view(*x.shape[:-1], -1, self.head_dim)`, or from an attribute that counts heads"
    )

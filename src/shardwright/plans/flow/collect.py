"""From atoms that are bound to each other to units, groups and their members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardwright.plans.flow.atoms import Labels, distinct
from shardwright.plans.flow.memory import Origin, thin
from shardwright.plans.flow.settle import closed_atoms, settle
from shardwright.plans.flow.state import Axis, Flow
from shardwright.plans.groups import Member, UnitGroup, UnitKind

FEATURE_UNITS = (64, 32, 16, 8)
"""Hidden features of an MLP are dealt in multiples of the largest of these that leaves work for everybody."""

Users = frozenset[int]
"""Units that need an atom; a unit is the least atom of what is bound together."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of indices that the same units need: those from `first` up to `last`, in the order of the group."""

    start: int
    stop: int
    first: int
    last: int


def collect(flow: Flow) -> list[UnitGroup]:
    """The groups of a model, of what every rank may have its own part of."""
    settle(flow)
    return [*cut_groups(flow), *vocabulary_groups(flow), *expert_groups(flow)]


def users(flow: Flow) -> dict[int, Users]:
    """Units that need an atom, for each that is needed; by the least of what is bound together."""
    holders, needed = flow.atoms.needs()
    by_atom: dict[int, list[int]] = defaultdict(list)
    for holder, atom in zip(holders.tolist(), needed.tolist(), strict=True):
        by_atom[atom].append(holder)
    found: dict[int, Users] = {}

    def of(atom: int, above: frozenset[int]) -> Users:
        if atom not in by_atom:
            return frozenset((atom,))
        if atom in above:  # two that need each other
            return frozenset()
        if atom not in found:
            made = frozenset[int]().union(*(of(holder, above | {atom}) for holder in by_atom[atom]))
            if above & set(by_atom[atom]):
                return made
            found[atom] = made
        return found[atom]

    for atom in by_atom:
        of(atom, frozenset())
    return found


def cut_groups(flow: Flow) -> list[UnitGroup]:
    """Groups whose columns end in rows."""
    _align_layers(flow, _ends(flow))
    ends = _ends(flow)
    groups = (_group(flow, keys, ends) for keys in ends.connected)
    return [group for group in groups if group is not None]


@dataclass(frozen=True, slots=True)
class Ends:
    """What is bound, seen from the rows in which it ends."""

    roots: dict[Origin, Labels]
    """Of each dimension of each parameter."""
    needed_by: dict[int, Users]
    closing: frozenset[int]
    """Units."""
    connected: list[list[Origin]]
    """Dimensions that share units, directly or by others, in the order of the model."""

    def users(self, atom: int) -> Users:
        """Units that need an atom; none if every rank has it, or nothing comes of it."""
        if (users := self.needed_by.get(atom)) is not None:
            return users & self.closing
        return frozenset((atom,)) if atom in self.closing else frozenset()

    def closed(self, keys: Sequence[Origin]) -> list[Origin]:
        """Those of some dimensions that are rows."""
        found = []
        for key in keys:
            atoms = set(self.roots[key].tolist())
            if len(atoms) > 1 and atoms <= self.closing:
                found.append(key)
        return found


def _ends(flow: Flow) -> Ends:
    needed_by = users(flow)
    closing = closed_atoms(flow)
    shared = np.array(sorted(needed_by), dtype=np.int64)
    ends = Ends({}, needed_by, frozenset(closing.tolist()), [])
    touching = {}
    for axis in flow.axes:
        found = flow.atoms.find(axis.atoms)
        atoms = distinct(found)
        units = frozenset(atoms[np.isin(atoms, closing)].tolist())
        units = units.union(*(ends.users(a) for a in atoms[np.isin(atoms, shared)].tolist()))
        if units:
            ends.roots[axis.name, axis.dim] = found
            touching[axis.name, axis.dim] = units
    ends.connected.extend(_connected(touching))
    return ends


def _align_layers(flow: Flow, ends: Ends) -> None:
    """Layers that share keys and values deal their query heads alike: the first of one with the first of the other."""
    for keys in ends.connected:
        orders = [list(dict.fromkeys(ends.roots[key].tolist())) for key in ends.closed(keys)]
        for order in orders[1:]:
            if len(order) == len(orders[0]) and not set(order) & set(orders[0]):
                flow.atoms.bind(np.array(orders[0]), np.array(order))


def _connected(touching: Mapping[Origin, frozenset[int]]) -> list[list[Origin]]:
    """Dimensions that share units, directly or by others."""
    sets: list[tuple[set[int], list[Origin]]] = []
    for key, units in touching.items():
        joined = [entry for entry in sets if entry[0] & units]
        merged = (set(units).union(*(u for u, _ in joined)), [k for _, keys in joined for k in keys] + [key])
        place = sets.index(joined[0]) if joined else len(sets)
        sets = [entry for entry in sets if entry not in joined]
        sets.insert(place, merged)
    return [keys for _, keys in sets]


def _group(flow: Flow, keys: Sequence[Origin], ends: Ends) -> UnitGroup | None:
    """The group of dimensions that share units; None if there is one unit, or units are needed out of order.

    Units are in the order of the rows in which they end. Where what several of them need is in another, as that of keys
    which are repeated as a whole, for the first query head of each and then the second, they are in this one.
    """
    closed = ends.closed(keys)
    if not closed:
        return None
    shared = [key for key in keys if any(len(ends.users(atom)) > 1 for atom in ends.roots[key].tolist())]
    for first in ((), shared):
        order = _order((*first, *closed, *keys), ends)
        if len(order) > 1 and (members := _members(keys, order, ends)) is not None:
            multiplied = [np.zeros(1, np.int64), *(labels.ravel() for labels in flow.heads)]
            is_heads = bool(np.isin(flow.atoms.find(np.concatenate(multiplied)), list(order)).any())
            kind = UnitKind.HEADS if is_heads else UnitKind.FEATURES
            group = UnitGroup(kind, len(order), tuple(members), "traced")
            return group if is_heads else coarser(group)
    return None


def _order(keys: Sequence[Origin], ends: Ends) -> dict[int, int]:
    """Units by number, as dimensions have them one after another."""
    order: dict[int, int] = {}
    for key in keys:
        for atom in dict.fromkeys(ends.roots[key].tolist()):
            for unit in sorted(ends.users(atom)):
                order.setdefault(unit, len(order))
    return order


def _members(keys: Sequence[Origin], order: Mapping[int, int], ends: Ends) -> list[Member] | None:
    """Dimensions as members of a group; None if something is needed by units that do not follow each other."""
    members: list[Member] = []
    for name, dim in keys:
        atoms, place = np.unique(ends.roots[name, dim], return_inverse=True)
        spans = np.empty((len(atoms), 2), dtype=np.int64)
        for row, atom in enumerate(atoms.tolist()):
            needed = [order[unit] for unit in ends.users(atom)] or range(len(order))
            first, last = min(needed), max(needed)
            if last - first + 1 != len(needed):
                return None
            spans[row] = first, last + 1
        members += members_of(name, dim, pieces_of(spans[place.ravel()]), len(order))
    return members


def pieces_of(spans: Labels) -> list[Piece]:
    """Runs of indices that the same units need, from [indices, 2] first and last unit of each."""
    starts = [0, *(np.nonzero((spans[1:] != spans[:-1]).any(axis=1))[0] + 1).tolist()]
    stops = [*starts[1:], len(spans)]
    units = spans[starts].tolist()
    return [Piece(start, stop, *needed) for start, stop, needed in zip(starts, stops, units, strict=True)]


def members_of(name: str, dim: int, pieces: Sequence[Piece], units: int) -> list[Member]:
    """Pieces as members: those of one length that follow each other, as their units do, make up a segment."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and piece.stop - piece.start == last.stop - last.start
            and piece.first == last.last
            and piece.last - piece.first == last.last - last.first
        ):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    segments: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for run in runs:
        key = (len(run), run[0].first, run[-1].last)
        segments.setdefault(key, []).append((run[0].start, run[-1].stop))
    return [
        Member(name, dim, tuple(ranges), count, span=None if (first, last) == (0, units) else (first, last))
        for (count, first, last), ranges in segments.items()
    ]


def coarser(group: UnitGroup) -> UnitGroup:
    """Features in larger units, where all members have as many."""
    if any(m.span is not None or m.units not in (1, group.units) for m in group.members):
        return group
    unit = next((u for u in FEATURE_UNITS if group.units % u == 0 and group.units // u >= 8), 1)
    units = group.units // unit
    members = tuple(Member(m.name, m.dim, m.segments, min(m.units, units)) for m in group.members)
    return UnitGroup(group.kind, units, members, group.source)


def vocabulary_groups(flow: Flow) -> list[UnitGroup]:
    """Tables that tokens are looked up in, and heads, by rows."""
    groups = []
    heads = heads_of(flow)
    for axis in flow.axes:
        if not flow.atoms.find(axis.atoms).any():
            continue  # code looks at it otherwise too
        if axis.dim == 0 and (axis.name in flow.tables or axis.name in heads):
            bias = heads.get(axis.name)
            names = [axis.name] if bias is None else [axis.name, bias]
            units = len(axis.atoms)
            members = tuple(Member(name, 0, ((0, units),), units) for name in names)
            groups.append(UnitGroup(UnitKind.VOCABULARY, units, members, "traced"))
    return groups


def heads_of(flow: Flow) -> dict[str, str | None]:
    """Weights whose columns the model returns, and their biases."""
    found: dict[str, str | None] = {}
    labelled = (flow.memory.labels(ref) for ref in flow.trace.outputs)
    returned = [np.zeros(0, np.int64), *(thin(labels).ravel() for labels in labelled if labels is not None)]
    atoms = distinct(np.concatenate(returned))
    axes: list[Axis] = [a for a in flow.axes if np.isin(flow.atoms.find(a.atoms), atoms[atoms != 0]).any()]
    for axis in axes:
        if axis.dim == 0 and len(flow.trace.refs[axis.name].size) == 2:
            found[axis.name] = next(
                (a.name for a in axes if a is not axis and len(flow.trace.refs[a.name].size) == 1), None
            )
    return found


def expert_groups(flow: Flow) -> list[UnitGroup]:
    """Stacked matrices of experts, by expert, one group for each module that holds some."""
    by_owner: dict[str, list[Axis]] = defaultdict(list)
    for axis in flow.axes:
        if axis.dim == 0 and axis.name in flow.stacked and len(flow.trace.refs[axis.name].size) > 2:
            by_owner[axis.name.rpartition(".")[0]].append(axis)
    groups = []
    for owner, axes in by_owner.items():
        units = len(axes[0].atoms)
        held = [a for a in flow.axes if a.dim == 0 and len(a.atoms) == units and a.name.rpartition(".")[0] == owner]
        members = tuple(Member(a.name, 0, ((0, units),), units) for a in held)
        groups.append(UnitGroup(UnitKind.EXPERTS, units, members, "traced"))
    return groups

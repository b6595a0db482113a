"""How units are dealt: too few for the ranks, unevenly, or shared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject, Weight
from shardwright.plans.groups import UnitGroup, UnitKind, ranges_of
from shardwright.plans.quantities import size
from shardwright.plans.undealt import more_layers, named, named_units, too_few


def check_deal(subject: Subject) -> Iterator[Finding]:
    """Per kind of group that the plan cuts, how its units are dealt to the ranks."""
    cut = {group: weights for group in subject.groups if (weights := _cut_weights(subject, group))}
    held = set(too_few(cut, subject.tp, subject.quantization))
    alike: dict[tuple[str, int], list[UnitGroup]] = defaultdict(list)
    for group, weights in cut.items():
        where = subject.guilty(weights[0])
        if group in held:
            alike[where, group.units].append(group)
        elif group.units < subject.tp:
            message = f"{group.units} {group.kind} cannot be dealt to {subject.tp} ranks: some would have none"
            yield Finding(Severity.ERROR, where, message, f"--tp {group.units}", f"too few {where}")
        elif group.kind is UnitKind.HEADS or group.kind is UnitKind.EXPERTS:
            yield from _dealt(subject, group, where)
    for groups in alike.values():
        yield _held(subject, groups[0], [cut[group] for group in groups])


def _cut_weights(subject: Subject, group: UnitGroup) -> list[Weight]:
    """What the plan cuts of a group."""
    weights = (subject.by_name[m.name] for m in group.members if subject.by_name[m.name].dim == m.dim)
    return list({weight.name: weight for weight in weights}.values())


def _held(subject: Subject, group: UnitGroup, alike: Sequence[Sequence[Weight]]) -> Finding:
    """Groups of one kind that every rank holds all of, since they have too few units, and others can be dealt."""
    few = group.units < subject.tp
    group_size = None if few or subject.quantization is None else subject.quantization.format.group_size
    units = named_units(group.kind, group.units, group_size)
    total = sum(weight.num_bytes for weights in alike for weight in weights)
    modules = list(dict.fromkeys(weight.module if weight.is_linear else weight.name for weight in alike[0]))
    return Finding(
        Severity.WARNING,
        subject.guilty(alike[0][0]),
        f"{units} cannot be dealt to {subject.tp} ranks: every rank holds all of "
        f"{named(modules)}{more_layers(len(alike))}, {size(total - total // subject.tp)} more than its share",
        f"--tp {group.units}" if group_size is None else "a smaller --quantization-group-size",
    )


def _dealt(subject: Subject, group: UnitGroup, where: str) -> Iterator[Finding]:
    quantum = subject.quantum(group)
    pieces = group.pieces(subject.tp, quantum)
    counts = [stop - start for start, stop in pieces]
    coarse = group.coarse
    if len(set(counts)) > 1:
        shared = f" ({coarse} of keys and values)" if coarse < group.units else ""
        shared += f", {quantum} of which fill a quantized group," if quantum > 1 else ""
        yield Finding(
            Severity.NOTE,
            where,
            f"{group.units} {group.kind}{shared} do not divide by {subject.tp}: ranks get {_listed(counts)}",
            cause=f"deal {where}",
        )
    if coarse < subject.tp:
        more = 0
        for member in group.members:
            weight = subject.by_name[member.name]
            ranges = [r for piece in pieces for r in ranges_of(member, group.units, piece)]
            held = sum(stop - start for start, stop in ranges) - sum(stop - start for start, stop in member.segments)
            more += weight.num_bytes * held // weight.shape[member.dim] if member.units > 1 else 0
        yield Finding(
            Severity.NOTE,
            where,
            f"{coarse} heads of keys and values are fewer than {subject.tp} ranks: several ranks hold the same, "
            f"{size(more)} a layer in all, and as much of the cache",
            cause=f"shared {where}",
        )


def _listed(counts: list[int]) -> str:
    return ", ".join(map(str, counts))

"""How units are dealt: too few for the ranks, unevenly, or shared."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject
from shardwright.plans.groups import UnitGroup, UnitKind, ranges_of
from shardwright.plans.quantities import size
from shardwright.plans.quantization import described


def check_deal(subject: Subject) -> Iterator[Finding]:
    """Per kind of group that the plan cuts, how its units are dealt to the ranks."""
    for group in subject.groups:
        cut = [m for m in group.members if subject.by_name[m.name].dim == m.dim]
        if not cut:
            continue
        first = subject.by_name[cut[0].name]
        where = subject.guilty(first)
        if group.units < subject.tp:
            yield Finding(
                Severity.ERROR,
                where,
                f"{group.units} {group.kind} cannot be dealt to {subject.tp} ranks: some would have none",
                f"--tp {group.units}",
                f"too few {where}",
            )
        elif group.most_ranks(subject.quantum(group)) < subject.tp:
            assert subject.quantization is not None, "else units are dealt one by one"
            message = described(group, subject.quantization, subject.tp)
            fix = "a smaller --quantization-group-size"
            yield Finding(Severity.WARNING, where, message, fix, f"quantized {where}")
        elif group.kind is UnitKind.HEADS or group.kind is UnitKind.EXPERTS:
            yield from _dealt(subject, group, where)


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

"""What no entry covers, and what every rank then holds whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shardwright.plans.check.composition import parts_of
from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject, Weight, is_stack, line
from shardwright.plans.groups import UnitGroup, UnitKind
from shardwright.plans.quantities import plural, size
from shardwright.plans.styles import COLUMN_GATHERED, VOCABULARY

ORDER = (UnitKind.HEADS, UnitKind.FEATURES, UnitKind.EXPERTS, UnitKind.VOCABULARY)


def check_coverage(subject: Subject) -> Iterator[Finding]:
    """Groups that could be cut and are whole on every rank, with what that costs; then what cannot be cut."""
    told: set[str] = set()
    kinds: dict[tuple[str, ...], list[UnitGroup]] = {}
    for group in sorted(subject.groups, key=lambda g: ORDER.index(g.kind)):
        members = sorted((subject.by_name[m.name] for m in group.members), key=lambda w: len(w.shape) < 2)
        names = tuple(dict.fromkeys(subject.lacking(w) for w in members))
        kinds.setdefault(names, []).append(group)
    for names, groups in kinds.items():
        weights = {w.name: w for g in groups for m in g.members for w in [subject.by_name[m.name]]}
        matrices = [w for w in weights.values() if len(w.shape) > 1]
        if not matrices or any(w.dim is not None or w.pattern is not None for w in weights.values()):
            continue
        if any(w.name in told for w in matrices):
            continue
        told |= weights.keys()
        yield _uncovered(subject, names, groups, list(weights.values()))
    rest = [
        w
        for w in subject.weights
        if w.is_linear and w.pattern is None and len(w.shape) > 1 and w.name not in told and not _in_group(subject, w)
    ]
    if rest:
        names = tuple(dict.fromkeys(subject.lacking(w) for w in rest))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        total = sum(w.num_bytes for w in rest)
        yield Finding(
            Severity.NOTE,
            names[0],
            f"every rank holds all of {shown}: {size(total)}; what they give is needed whole",
        )


def _uncovered(subject: Subject, names: tuple[str, ...], groups: list[UnitGroup], weights: list[Weight]) -> Finding:
    total = sum(w.num_bytes for w in weights)
    lost = total - total // subject.tp
    fixes = dict.fromkeys(_fix(subject, group) for group in groups[:1])
    typo = next((subject.typos[name] for name in names if name in subject.typos), None)
    where = typo or names[0]
    others = f" with {', '.join(name.rpartition('.')[2] for name in names[1:4])}" if names[1:] else ""
    copies = f" in {plural(len(groups), 'layer')}" if len(groups) > 1 else ""
    message = (
        f"{'matches nothing, so ' + names[0] if typo else 'is'}{' is' if typo else ''} in no entry{others}{copies}: "
        f"each rank holds all of its {size(total)}, {size(lost)} more than its share"
    )
    return Finding(Severity.WARNING, where, message, "\n".join(fixes), f"tp {where}")


def _fix(subject: Subject, group: UnitGroup) -> str:
    if group.kind is UnitKind.VOCABULARY:
        weight = subject.by_name[group.members[0].name]
        word = VOCABULARY if isinstance(weight.owner, nn.Embedding) else COLUMN_GATHERED
        return line(subject.lacking(weight), word.name)
    parts = parts_of(subject, group)
    lines = dict.fromkeys(
        line(subject.lacking(part.weight), part.right_word) for part in parts if _needs_line(part.weight)
    )
    containers = [p.weight for p in parts if is_stack(p.weight)]
    if containers:
        lines[line(subject.general[containers[0].module], "moe_tp_experts")] = None
    return "\n".join(lines)


def _needs_line(weight: Weight) -> bool:
    """Whether an entry of its own: biases go with their matrices."""
    return len(weight.shape) > 1 or not weight.is_linear


def _in_group(subject: Subject, weight: Weight) -> bool:
    return any(name == weight.name for name, _ in subject.grouped)

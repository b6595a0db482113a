"""Do the styles of what belongs together go together.

In a group (the heads of an attention, the hidden features of an MLP) either every rank works on its own units, or all
on all of them. Each parameter of the group says which: a column-cut projection makes parts, a row-cut one takes parts;
one that gathers its output, splits its input, or is not cut deals in whole tensors. Where they disagree, those that
have fewer on their side are guilty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject, Weight, is_stack, line
from shardwright.plans.groups import Member, UnitGroup, UnitKind
from shardwright.plans.styles import COLUMN, COLUMN_GATHERED, EXPERTS, PACKED_COLUMN, ROW, ROW_SPLIT, Cut


class Role(StrEnum):
    """What a dimension of a parameter has to do with the units of its group."""

    MAKES = "makes"
    """Output features of a linear."""
    TAKES = "takes"
    """Input features of a linear."""
    HAS = "has"
    """Anything else: a vector or a stack of matrices, one piece a unit."""


@dataclass(frozen=True, slots=True)
class Part:
    """One dimension of one parameter, and what the plan makes of it."""

    weight: Weight
    dim: int
    role: Role
    is_parted: bool
    """Every rank works on its own units here."""
    num_segments: int

    @property
    def right_word(self) -> str:
        """The style with which it would work on its own units."""
        if self.role is Role.MAKES:
            return COLUMN.name if self.num_segments == 1 else PACKED_COLUMN.name
        if self.role is Role.TAKES:
            return ROW.name
        if self.dim == 0 and len(self.weight.shape) > 2:
            return EXPERTS.name
        is_last = self.dim == len(self.weight.shape) - 1 and len(self.weight.shape) > 1
        if self.num_segments > 1:
            return "packed_rowwise" if is_last else PACKED_COLUMN.name
        return ROW.name if is_last else COLUMN.name


def check_composition(subject: Subject) -> Iterator[Finding]:
    """Groups whose parameters disagree, and cuts of what belongs to no group."""
    for group in subject.groups:
        yield from _check_logits(subject, group) if group.kind is UnitKind.VOCABULARY else _check_group(subject, group)
    if any(group.source == "traced" for group in subject.groups):
        yield from _check_ungrouped(subject)


def _check_group(subject: Subject, group: UnitGroup) -> Iterator[Finding]:
    parts = parts_of(subject, group)
    parted = [part for part in parts if part.is_parted]
    whole = [part for part in parts if not part.is_parted]
    if not parted:
        if all(member.units > 1 for member in group.members):
            yield from _needless_gathers(subject, parts)
        return
    if not whole:
        return
    # an entry that matches nothing but means one of them counts for what its author meant
    meant = [part for part in whole if subject.lacking(part.weight) in subject.typos]
    votes_parted, votes_whole = _modules(parted + meant), _modules([part for part in whole if part not in meant])
    if len(votes_parted) >= len(votes_whole):
        for part in whole:
            yield _whole_among_parted(subject, part, parted)
    else:
        for part in parted:
            yield _parted_among_whole(subject, part, whole)


def _check_logits(subject: Subject, group: UnitGroup) -> Iterator[Finding]:
    """Heads whose logits stay in parts."""
    for part in parts_of(subject, group):
        if part.is_parted and part.role is Role.MAKES and subject.adds_up(part.weight.module) is None:
            where = subject.guilty(part.weight)
            message = f"{part.weight.style.name} leaves every rank a part of the logits"
            yield Finding(Severity.ERROR, where, message, line(where, COLUMN_GATHERED.name), f"tp {where}")


def parts_of(subject: Subject, group: UnitGroup) -> list[Part]:
    """The parameters of a group that may be parted or not: what has one unit is the same either way."""
    dims: dict[tuple[str, int], list[Member]] = {}
    for member in group.members:
        dims.setdefault((member.name, member.dim), []).append(member)
    parts = []
    for (name, dim), members in dims.items():
        if any(member.units > 1 or member.span is not None for member in members):
            weight = subject.by_name[name]
            role = _role(weight, dim)
            is_parted = weight.dim == dim
            if role is Role.MAKES:
                is_parted = is_parted and not subject.gathers(weight)
            elif role is Role.TAKES:
                is_parted = is_parted and not subject.splits(weight)
            parts.append(Part(weight, dim, role, is_parted, len(members[0].segments)))
    return parts


def _role(weight: Weight, dim: int) -> Role:
    if dim == weight.output_dim or (isinstance(weight.owner, nn.Embedding) and dim == 1):
        return Role.MAKES
    return Role.TAKES if dim == weight.input_dim else Role.HAS


def _modules(parts: Sequence[Part]) -> Counter[str]:
    return Counter(part.weight.module if part.weight.is_linear else part.weight.name for part in parts)


def _whole_among_parted(subject: Subject, part: Part, parted: Sequence[Part]) -> Finding:
    where = subject.guilty(part.weight)
    name = subject.lacking(part.weight)
    others = _named(subject, parted)
    if part.weight.pattern is None:
        what = f"{name} is in no entry" if where == name else f"matches nothing, so {name} is in no entry"
    elif subject.gathers(part.weight) or subject.splits(part.weight):
        what = f"{part.weight.style.name} deals in whole tensors"
    elif part.weight.dim is None:
        what = f"{part.weight.style.name} keeps it whole"
    else:
        what = f"{part.weight.style.name} cuts its {'output' if part.weight.style.is_column else 'input'} features"
    message = f"{what}, while every rank has its own part of {others}, which go with it"
    return Finding(Severity.ERROR, where, message, line(name, part.right_word), f"tp {where}")


def _parted_among_whole(subject: Subject, part: Part, whole: Sequence[Part]) -> Finding:
    where = subject.guilty(part.weight)
    style = part.weight.style.name
    others = _named(subject, whole)
    if part.role is Role.TAKES:
        message = f"{style} expects its part of an input that {others} give whole"
        better = ROW_SPLIT.name
    elif part.role is Role.MAKES:
        message = f"{style} leaves parts of an output that {others} need whole, with no row-cut linear behind it"
        better = COLUMN_GATHERED.name
    else:
        message = f"{style} cuts it, while {others}, which go with it, are whole"
        better = "replicate"
    return Finding(Severity.ERROR, where, message, line(where, better), f"tp {where}")


def _needless_gathers(subject: Subject, parts: Sequence[Part]) -> Iterator[Finding]:
    """Outputs that are gathered though the next linear would take the parts."""
    makers = [part for part in parts if part.role is Role.MAKES]
    takers = [part for part in parts if part.role is Role.TAKES]
    gathered = all(part.weight.dim == part.dim for part in [*makers, *takers]) and makers and takers
    if gathered and all(part.role is not Role.HAS for part in parts):
        fix = dict.fromkeys(line(subject.lacking(part.weight), part.right_word) for part in [*makers, *takers])
        yield Finding(
            Severity.NOTE,
            subject.guilty(makers[0].weight),
            f"is gathered on every rank, and {subject.lacking(takers[0].weight)} takes its part out of it again: "
            "without either, a step communicates less",
            "\n".join(fix),
            f"gathered {subject.guilty(makers[0].weight)}",
        )


def _check_ungrouped(subject: Subject) -> Iterator[Finding]:
    """Cuts of dimensions that nothing else is known to be cut with."""
    loose = [w for w in subject.weights if w.dim is not None and (w.name, w.dim) not in subject.grouped]
    pairs: dict[str, list[Weight]] = {}
    for weight in loose:
        if not any(name == weight.name and not (dim == 0 and is_stack(weight)) for name, dim in subject.grouped):
            pairs.setdefault(_holder(weight), []).append(weight)
    for weight in loose:
        wrong = _wrong_if_ungrouped(subject, weight)
        if wrong is None or weight.pattern is None:
            continue
        if _makes_and_takes(pairs.get(_holder(weight), ())):
            yield _not_followed(subject, weight, pairs[_holder(weight)])
        else:
            message, better = wrong
            fix = line(weight.pattern, better)
            yield Finding(Severity.ERROR, weight.pattern, message, fix, f"tp {weight.pattern}")


def _wrong_if_ungrouped(subject: Subject, weight: Weight) -> tuple[str, str] | None:
    """What is wrong with the cut of a dimension if nothing is cut with it, and the style that is right."""
    dim, style = weight.dim, weight.style
    if dim == weight.input_dim:
        message = f"{style.name} expects its part of an input that is whole: no column-cut linear is before it"
        return None if subject.splits(weight) else (message, _better_row(subject, weight))
    if dim == weight.output_dim and len(weight.shape) == 2:
        message = f"{style.name} leaves parts of an output that is needed whole: no row-cut linear is behind it"
        better = ROW.name if (weight.name, weight.input_dim) in subject.grouped else COLUMN_GATHERED.name
        return None if subject.gathers(weight) else (message, better)
    if weight.is_linear or style.cut in (Cut.VOCABULARY, Cut.EMBEDDING, Cut.EXPERTS):
        return None
    return f"{style.name} cuts what every rank needs whole", "replicate"


def _holder(weight: Weight) -> str:
    """The module in which one parameter makes what another takes."""
    return weight.module.rpartition(".")[0] if weight.is_linear else weight.module


def _makes_and_takes(weights: Sequence[Weight]) -> bool:
    """Whether parameters that are cut in one module look as if one made the parts that the other takes."""
    stacks = [weight for weight in weights if len(weight.shape) > 2]
    if len(stacks) > 1:
        return True
    makes = any(w.dim == w.output_dim and len(w.shape) == 2 for w in weights)
    return makes and any(w.dim == w.input_dim for w in weights)


def _not_followed(subject: Subject, weight: Weight, together: Sequence[Weight]) -> Finding:
    names = ", ".join(dict.fromkeys(subject.lacking(w).rpartition(".")[2] for w in together))
    return Finding(
        Severity.WARNING,
        subject.lacking(together[0]),
        f"what {names} make and take in parts cannot be followed through the code between them: only a proof shows "
        "whether it works on parts",
        "shardwright plan prove",
        f"not followed {subject.general[_holder(weight)]}",
    )


def _better_row(subject: Subject, weight: Weight) -> str:
    """What a row-cut linear without a column-cut one before it should be."""
    output = weight.output_dim
    in_group = [m for m in subject.members if m.name == weight.name and m.dim == output]
    if in_group:
        return COLUMN.name if len(in_group[0].segments) == 1 else PACKED_COLUMN.name
    return ROW_SPLIT.name


def _named(subject: Subject, parts: Sequence[Part]) -> str:
    names = list(dict.fromkeys(subject.lacking(part.weight) for part in parts))
    shown = [names[0], *(name.rpartition(".")[2] for name in names[1:3])]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + more

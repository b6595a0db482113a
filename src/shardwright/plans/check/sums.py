"""Are partial sums added up, and once.

A linear that is cut along its input gives partial sums, and so do experts of which each rank computes a part. Some
module, that one or one around it, must add them up; what every rank has whole must not be in the sum.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject, Weight, is_stack, line
from shardwright.plans.styles import DISPATCH, IDENTITY_EXPERT, ROUTER, ROW, Cut, Output


def check_sums(subject: Subject) -> Iterator[Finding]:
    """Sums that are missing, done twice, or of whole things."""
    adders = {
        name: style
        for name in subject.modules
        if (style := subject.style_of(name)).output is Output.SUMMED and style.cut is Cut.NONE
    }
    for weight in subject.weights:
        adder = next((a for name in subject.names_of_modules(weight) if (a := subject.adds_up(name))), None)
        if _is_partial(weight):
            if adder is None and not _goes_on(subject, weight):
                yield _never_added(subject, weight)
            elif adder is not None and adder in subject.names_of_modules(weight) and (outer := _around(adder, adders)):
                yield _added_twice(subject, weight, outer)
        elif adder in adders and _is_biased_twice(subject, weight):
            yield _bias(subject, weight, adder)
    for name in adders:
        if not any(w.dim is not None for w in _below(subject, name)):
            yield _nothing_to_add(subject, name)


def _is_partial(weight: Weight) -> bool:
    """Whether what a module computes with a parameter is a partial sum."""
    if weight.dim is None or len(weight.shape) < 2:
        return False
    if weight.is_linear:
        return weight.dim == weight.input_dim
    return is_stack(weight)


def _goes_on(subject: Subject, weight: Weight) -> bool:
    """Whether what a stack of matrices makes goes to another stack, whose results are added up."""
    groups = [group for group in subject.groups if any(m.name == weight.name for m in group.members)]
    modules = {m.name.rpartition(".")[0] for group in groups for m in group.members} - {weight.module}
    return is_stack(weight) and any(subject.adds_up(module) is not None for module in modules)


def _never_added(subject: Subject, weight: Weight) -> Finding:
    module = subject.general[weight.module]
    if weight.is_linear:
        where, word = subject.guilty(weight), ROW.name
    else:
        where = subject.typos.get(module, module)
        word = DISPATCH.name if weight.style.cut is Cut.EXPERTS else "moe_tp_experts"
    message = f"{weight.style.name} leaves every rank a partial sum, and no entry adds them up"
    return Finding(Severity.ERROR, where, message, line(module, word), f"tp {where}")


def _added_twice(subject: Subject, weight: Weight, outer: str) -> Finding:
    inner, around = subject.guilty(weight), next(p for p, names in subject.matched.items() if outer in names)
    others = [w for w in _below(subject, outer) if _is_partial(w) and not _adds_up_itself(subject, w)]
    where, other = (inner, around) if others else (around, inner)
    fix = line(inner, "local_rowwise") if others else "leave it out"
    message = (
        f"adds up over the ranks, and so does {other}, {'around' if others else 'within'} it: the result is as many "
        "times too large as there are ranks"
    )
    return Finding(Severity.ERROR, where, message, fix, f"tp {where}")


def _adds_up_itself(subject: Subject, weight: Weight) -> bool:
    return any(subject.style_of(name).output is Output.SUMMED for name in subject.names_of_modules(weight))


def _is_biased_twice(subject: Subject, weight: Weight) -> bool:
    """Whether a bias is added on every rank before the sum."""
    if weight.dim is not None or "bias" not in weight.name.rpartition(".")[2]:
        return False
    beside = [w for w in subject.weights if w.module == weight.module and w is not weight]
    return any(_is_partial(w) for w in beside) and not weight.style.is_row  # which the first rank alone adds


def _bias(subject: Subject, weight: Weight, adder: str) -> Finding:
    where = subject.general[weight.name]
    message = (
        f"every rank adds this bias, and {subject.general[adder]} adds up what they have: it counts as many times as "
        "there are ranks"
    )
    fix = line(subject.general[weight.module], "rowwise") if weight.is_linear else line(where, "rowwise")
    return Finding(Severity.ERROR, where, message, fix, f"tp {where}")


def _nothing_to_add(subject: Subject, name: str) -> Finding:
    where = next(pattern for pattern, names in subject.matched.items() if name in names)
    inside = [subject.typos[real] for w in _below(subject, name) if (real := subject.lacking(w)) in subject.typos]
    guilty = inside[0] if inside else where
    message = (
        f"{subject.plan.tp[where]} adds up what every rank has whole: nothing in {subject.general[name]} is cut, and "
        "the result is as many times too large as there are ranks"
    )
    cut = [f"{subject.general[w.name]}" for w in _below(subject, name) if len(w.shape) > 1][:2]
    fix = "cut what is in it: " + ", ".join(cut) if cut else "leave it out"
    return Finding(Severity.ERROR, guilty, message, fix, f"tp {guilty}")


def _below(subject: Subject, name: str) -> list[Weight]:
    prefix = f"{name}."
    special = (IDENTITY_EXPERT, ROUTER)
    return [
        w for w in subject.weights if any(n.startswith(prefix) for n in (w.name, *w.aliases)) and w.style not in special
    ]


def _around(name: str, adders: object) -> str | None:
    levels = name.split(".")
    above = (".".join(levels[:depth]) for depth in range(len(levels) - 1, 0, -1))
    return next((n for n in above if n in adders), None)  # type: ignore[operator]

"""Fit a model's code to parts of its parameters: which attributes have to say what a rank has, and what cannot be cut.

Code that takes sizes from its tensors runs on a part as on the whole. Other code asks attributes for head counts and
widths. Which of them must change, names do not say for sure: a head count may equal a head size. So every module whose
parameters are cut is rehearsed: whole, and as the ranks would run it, with ever more of the attributes changed that its
code reads and whose value is one of the sizes that are cut. The first choice under which the ranks together give what
the whole gives is taken. If there is none (code that computes sizes of whole tensors, or something else that depends on
the number of a head), it is not cut at all.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.plans.cut import cut
from shardwright.plans.fit_kinds import Kind, kinds_of, rehearsed_length
from shardwright.plans.fit_trials import TOLERANCE, Trials, first_line
from shardwright.plans.rehearsal import (
    Call,
    difference,
    first_outputs,
    rehearse,
    with_made_up_weights,
)
from shardwright.plans.replicate import is_in, without
from shardwright.plans.sizes import Local
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import run_ranks


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

    sizes: tuple[Local, ...] = ()
    misfits: tuple[Misfit, ...] = ()


def fit(module: nn.Module, table: ShardTable) -> Fit:
    """Find the attributes that have to change for a model to run as a table cuts it.

    Args:
        module: the whole model, with weights or on "meta"; left as it is.
        table: its plan, resolved.

    Returns: the same on every rank.
    """
    kinds = list(kinds_of(module, table)) if table.tp > 1 else []
    if not kinds:
        return Fit()
    num_tokens = rehearsed_length(kinds)
    try:
        calls = _calls(module, kinds, num_tokens)
    except Exception as exc:  # of the model's code
        reason = f"its code cannot be tried out on a few tokens: {type(exc).__name__}: {first_line(exc)}"
        return Fit(misfits=tuple(Misfit(tuple(kind.scopes), reason) for kind in kinds))
    sizes: list[Local] = []
    reasons: dict[str, str] = {}
    for kind in kinds:
        first, call = kind.scopes[0], calls.get(kind.scopes[0])
        found = Trials(module, table, kind, call).search() if call is not None else "nothing calls it"
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
    called = [kind for kind in kinds if kind.scopes[0] in calls]
    misfits = [Misfit(tuple(kind.scopes), reasons[kind.scopes[0]]) for kind in kinds if kind not in called]
    if any(kind.scopes[0] in reasons for kind in called):
        misfits = _settle(module, table, called, misfits, sizes, reasons, num_tokens)
    held = {name for misfit in misfits for name in misfit.modules}
    return Fit(tuple(size for size in sizes if not is_in(size.module, held)), tuple(misfits))


def _calls(module: nn.Module, kinds: list[Kind], num_tokens: int) -> dict[str, Call]:
    """A call of one module of each kind, which becomes its first: a few tokens do not choose every expert."""
    calls = rehearse(module, [kind.scopes[0] for kind in kinds], num_tokens=num_tokens)
    if missing := [kind for kind in kinds if kind.scopes[0] not in calls]:
        calls |= rehearse(module, [scope for kind in missing for scope in kind.scopes], num_tokens=num_tokens)
        for kind in missing:
            kind.scopes.sort(key=lambda scope: scope not in calls)
    return calls


def _settle(
    module: nn.Module,
    table: ShardTable,
    kinds: list[Kind],
    misfits: list[Misfit],
    sizes: list[Local],
    reasons: dict[str, str],
    num_tokens: int,
) -> list[Misfit]:
    """Decide what is not cut, where something went wrong when it was tried out alone.

    It may have been given something whole that another module, cut, would give it in parts; and what is not cut may
    need others whole in turn. So the model is run with all of its parts: the first module whose output is wrong is
    taken back, with what is cut together with it, until nothing is wrong.
    """
    left, misfits = list(kinds), list(misfits)
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
    return misfits


def _first_wrong(
    module: nn.Module, table: ShardTable, names: list[str], sizes: list[Local], num_tokens: int
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


def _below(scope: str, name: str) -> str:
    return f"{scope}.{name}" if name else scope

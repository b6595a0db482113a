"""Stages as they come out: can the layers be dealt, and can a stage run without what others own."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.errors import PlanError
from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject
from shardwright.plans.check.tied import check_tied_stages
from shardwright.plans.pipeline import plan_pipeline
from shardwright.plans.resolve import resolve
from shardwright.plans.stages import layer_stack
from shardwright.plans.table import ShardTable


def check_stages(subject: Subject) -> Iterator[Finding]:
    """How the layers fall into stages, and what stages need of each other."""
    table: ShardTable | None = None
    try:
        table = resolve(subject.module, subject.plan, [], tp=1, pp=subject.pp, pp_split=subject.pp_split)
    except PlanError as error:
        yield _undealt(subject, error)
    if table is None:
        return
    yield from check_tied_stages(table)
    try:
        plan_pipeline(subject.module, table)
    except PlanError as error:
        yield Finding(Severity.ERROR, "pp_plan", str(error), "--pp 1", "pp stages")


def _undealt(subject: Subject, error: PlanError) -> Finding:
    try:
        stack = layer_stack(subject.module, subject.plan)
    except PlanError:
        return Finding(Severity.ERROR, "pp_plan", str(error), cause="pp missing")
    num = len(stack.layers)
    if subject.pp_split is not None:
        even = [num // subject.pp + (i < num % subject.pp) for i in range(subject.pp)]
        fix = f"--pp-split {','.join(map(str, even))}" if num >= subject.pp else f"--pp {num}"
        return Finding(Severity.ERROR, f"pp_split {','.join(map(str, subject.pp_split))}", str(error), fix)
    around = [
        type(subject.modules[name]).__name__
        for name in subject.modules
        if any(layer.startswith(f"{name}." if name else "") for layer in stack.layers)
    ]
    if held := [name for name in dict.fromkeys(around) if name in subject.plan.no_split]:
        message = f"holds {num} layers, which may not be split: they cannot be dealt to {subject.pp} stages"
        layer = type(subject.modules[stack.layers[0]]).__name__
        return Finding(Severity.ERROR, f"no_split {held[0]}", message, f'"no_split": ["{layer}"]')
    return Finding(Severity.ERROR, stack.container, str(error), f"--pp {num}", f"pp {stack.container}")

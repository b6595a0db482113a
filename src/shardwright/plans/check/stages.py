"""Stages as they come out: can the layers be dealt, and can a stage run without what others own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.pipeline import pipeline_line
from shardwright.plans.check.subject import Subject
from shardwright.plans.check.tied import check_tied_stages
from shardwright.plans.pipeline import plan_pipeline
from shardwright.plans.plan import PipelineEntry
from shardwright.plans.quantities import size
from shardwright.plans.resolve import resolve
from shardwright.plans.stages import layer_stack
from shardwright.plans.table import ParameterRow, ShardTable


def check_stages(subject: Subject) -> Iterator[Finding]:
    """How the layers fall into stages, and what stages need of each other."""
    table: ShardTable | None = None
    try:
        table = resolve(
            subject.module,
            subject.plan,
            [],
            tp=1,
            pp=subject.pp,
            pp_split=subject.pp_split,
            flow=subject.flow,
            quantization=subject.quantization,
        )
    except PlanError as error:
        yield _undealt(subject, error)
    if table is None:
        return
    yield from check_tied_stages(table)
    yield from _left_out(subject, table)
    try:
        plan_pipeline(subject.module, table, flow=subject.flow)
    except PlanError as error:
        yield Finding(Severity.ERROR, "pp_plan", str(error), "--pp 1", "pp stages")


def _left_out(subject: Subject, table: ShardTable) -> Iterator[Finding]:
    """Modules outside of the layers that no entry names, and the stages that then hold them."""
    if not subject.plan.pp:
        return
    entries = tuple(f"{name}." for name in subject.plan.pp)
    by_module: dict[str, list[ParameterRow]] = {}
    for row in table.parameters:
        if not any(name.startswith(entries) for name in (row.name, *row.aliases)):
            by_module.setdefault(row.name.rpartition(".")[0], []).append(row)
    total = sum(row.local_bytes(0) for row in table.parameters)
    for name, rows in by_module.items():
        num_bytes = sum(row.local_bytes(0) for row in rows)
        stages = sorted({stage for row in rows for stage in row.stages})
        is_large = num_bytes * 50 > total
        makes_logits = is_large and not isinstance(subject.modules[name], nn.Embedding)
        takes = "input_ids" if isinstance(subject.modules[name], nn.Embedding) else "hidden_states"
        entry = PipelineEntry((takes,), ("logits" if makes_logits else "hidden_states",))
        where = f"stages {', '.join(map(str, stages))} hold" if len(stages) > 1 else f"stage {stages[0]} holds"
        yield Finding(
            Severity.WARNING if is_large else Severity.NOTE,
            name,
            f"is in no entry of the pipeline: {where} its {size(num_bytes)}, for that is where it is computed with",
            pipeline_line(name, entry),
            f"pp {name}",
        )


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

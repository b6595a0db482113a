"""One trial of a plan: all ranks run the model as the plan cuts it, and are compared with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from shardwright.foreign_errors import described
from shardwright.plans.fit import Fit, fit
from shardwright.plans.groups import UnitGroup
from shardwright.plans.pipeline import Pipeline, PipelineStage, plan_pipeline
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.prove.judge import Verdict, judge
from shardwright.plans.prove.record import Call, Recorder
from shardwright.plans.prove.subject import Subject
from shardwright.plans.replicate import without
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import shard
from shardwright.plans.stack import find_stack
from shardwright.plans.table import ShardTable
from shardwright.plans.threads import MemoryLink, ThreadCollectives, run_ranks
from shardwright.plans.units import unit_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A plan, and what it came to."""

    plan: ParallelPlan
    table: ShardTable
    fitted: Fit
    pipeline: Pipeline | None
    """Of more than one stage."""
    whole: tuple[str, ...]
    """Modules of which every rank held all, whatever the plan says."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all trials have in common."""

    subject: Subject
    tp: int
    pp: int
    pp_split: Sequence[int] | None = None
    """Layers per stage; None: balanced."""
    tolerance: float

    @cached_property
    def _traced(self) -> list[UnitGroup] | None:
        """The model's unit groups; None if they depend on what a plan cuts."""
        groups = unit_groups(self.subject.module, ParallelPlan())
        return groups if groups and all(group.source == "traced" for group in groups) else None

    def on_one_stage(self) -> Bench:
        """The same without a pipeline."""
        other = replace(self, pp=1, pp_split=None)
        other.__dict__["_traced"] = self._traced
        return other

    def try_plan(self, plan: ParallelPlan, *, fitted: Fit | None = None, whole: tuple[str, ...] = ()) -> Trial:
        """Run the model as a plan cuts it, and compare.

        Args:
            plan: to be tried.
            fitted: what the model's code asks for to be cut; None: it is found out, which takes longer.
            whole: modules that are not cut, whatever the plan says.

        Raises: PlanError if the plan cannot be carried out.
        """
        module = self.subject.module
        groups = self._traced if self._traced is not None else unit_groups(module, plan)
        table = resolve(module, plan, groups, tp=self.tp, pp=self.pp, pp_split=self.pp_split)
        table = without(table, whole) if whole else table
        pipeline = plan_pipeline(module, table) if self.pp > 1 else None
        if fitted is None:
            fitted = fit(module, table)
        stages, broken = _run(self.subject, table, fitted, pipeline)
        stack = find_stack(module)
        layers: Sequence[str] = stack.layers if stack is not None else ()
        verdict = judge(
            self.subject.calls,
            _calls_where_they_count(stages, table, self.subject.calls),
            table,
            layers=layers,
            broken=broken,
            tolerance=self.tolerance,
        )
        return Trial(plan=plan, table=table, fitted=fitted, pipeline=pipeline, whole=whole, verdict=verdict)


Calls = dict[tuple[str, int], list[Call]]


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank of one stage."""

    module: nn.Module
    recorder: Recorder
    source: MemoryLink | None
    target: MemoryLink | None


def _run(
    subject: Subject, table: ShardTable, fitted: Fit, pipeline: Pipeline | None
) -> tuple[list[Calls], tuple[str, str] | None]:
    """Run all ranks, stage by stage.

    Returns: the calls on every stage, in the order of ranks, and the module in which a rank failed, and why.
    """
    ways_in: list[MemoryLink | None] = [None] * table.tp
    stages: list[Calls] = []
    for stage in range(table.pp):
        ways_out: list[MemoryLink | None] = [None if stage == table.pp - 1 else MemoryLink() for _ in range(table.tp)]
        modules = [subject.copy() for _ in range(table.tp)]
        ranks = [
            _Rank(module, Recorder(module), source, target)
            for module, source, target in zip(modules, ways_in, ways_out, strict=True)
        ]
        broken = _run_stage(subject, table, fitted, pipeline, stage, ranks)
        calls: Calls = {}
        for rank in ranks:
            for call in rank.recorder.calls:
                calls.setdefault((call.module, call.number), []).append(call)
        stages.append(calls)
        if broken is not None:
            return stages, broken
        ways_in = ways_out
    return stages, None


def _run_stage(
    subject: Subject, table: ShardTable, fitted: Fit, pipeline: Pipeline | None, stage: int, ranks: Sequence[_Rank]
) -> tuple[str, str] | None:
    """Run the ranks of one stage. Returns the module in which one failed first, and why."""
    places: list[str] = []

    def work(group: ThreadCollectives) -> None:
        rank = ranks[group.rank]
        try:
            shard(rank.module, table, stage=stage, collectives=group, fitted=Fit(fitted.sizes))
            if pipeline is not None:
                PipelineStage(rank.module, pipeline, table, stage, source=rank.source, target=rank.target)
            with rank.recorder:
                subject.run(rank.module)
        except Exception:
            places.append(rank.recorder.running)
            raise

    try:
        with torch.no_grad():
            run_ranks(table.tp, work)
    except Exception as exc:  # the model's code, given parts that it did not expect
        return places[0], described(exc)
    return None


def _calls_where_they_count(stages: Sequence[Calls], table: ShardTable, reference: Sequence[Call]) -> Calls:
    """Of every call those on the stage that it belongs to.

    What runs before the layers counts on the first stage, what runs after them, or around them, on the last: elsewhere
    it may have been given numbers of no meaning.
    """
    homes = {name: stage.index for stage in table.stages for name in stage.layers}
    last_layer = max((place for place, call in enumerate(reference) if call.module in homes), default=-1)
    found: Calls = {}
    for place, call in enumerate(reference):
        levels = call.module.split(".")
        above = (".".join(levels[:depth]) for depth in range(len(levels), 0, -1))
        home = next((homes[name] for name in above if name in homes), 0 if place < last_layer else table.pp - 1)
        key = call.module, call.number
        if home < len(stages) and key in stages[home]:
            found[key] = stages[home][key]
    return found

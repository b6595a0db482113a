"""A plan, resolved and checked for one model and so many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.check import CheckReport, Subject, check
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.quantization import Quantization
from shardwright.plans.structure import Node, structure_tree
from shardwright.plans.table import ParameterRow, ShardTable, Stage
from shardwright.plans.units import unit_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryUse:
    """What one entry of the plan comes to."""

    pattern: str
    word: str
    rows: tuple[ParameterRow, ...]
    """Parameters that it decides over."""

    @property
    def cut(self) -> ParameterRow | None:
        """One of those that it cuts, the largest; None if it cuts nothing."""
        return max((row for row in self.rows if row.dim is not None), key=lambda row: prod(row.shape), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """All of it."""

    model: str
    """How the user calls it."""
    tp: int
    pp: int
    plan: ParallelPlan
    table: ShardTable | None
    """None if the plan cannot be carried out: the check says why."""
    check: CheckReport
    tree: Node

    @property
    def ok(self) -> bool:
        """Whether the plan can be carried out, and nothing is wrong with it."""
        return self.table is not None and self.check.ok

    @property
    def rows(self) -> tuple[ParameterRow, ...]:
        """Of every parameter."""
        return () if self.table is None else self.table.parameters

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of the pipeline."""
        return () if self.table is None else self.table.stages

    def uses(self) -> Iterator[EntryUse]:
        """The entries of the plan, and what they come to."""
        by_pattern: dict[str | None, list[ParameterRow]] = {}
        for row in self.rows:
            by_pattern.setdefault(row.matched_by, []).append(row)
        for pattern, word in self.plan.tp.items():
            yield EntryUse(pattern=pattern, word=word, rows=tuple(by_pattern.get(pattern, ())))

    def memory(self) -> list[dict[str, int]]:
        """Bytes of weights on every rank, in the order of their numbers."""
        if self.table is None:
            return []
        return [
            {"rank": number, "stage": stage, "tp_rank": rank, "weight_bytes": self.table.weight_bytes(stage, rank)}
            for number, (stage, rank) in enumerate(self.table.ranks())
        ]

    def as_json(self) -> dict[str, Any]:
        """The document of `plan show|infer|check --json`."""
        return {
            "ok": self.ok,
            "model": self.model,
            "tp": {"size": self.tp, "source": self.plan.tp_source, "patterns": dict(self.plan.tp)},
            "pp": {
                "size": self.pp,
                "source": self.plan.pp_source,
                "entries": {name: [list(e.inputs), list(e.outputs)] for name, e in self.plan.pp.items()},
                "stages": [
                    {
                        "rank": stage.index,
                        "modules": list(stage.modules),
                        "parameters": sum(prod(row.shape) for row in self.rows if stage.index in row.stages),
                    }
                    for stage in self.stages
                ],
            },
            "parameters": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "style": row.word,
                    "matched_by": row.matched_by,
                    "dim": row.dim,
                    "pieces": row.pieces(self.tp),
                }
                for row in self.rows
            ],
            "memory": self.memory(),
            "findings": [finding.as_json() for finding in self.check.findings],
        }


def make_report(
    module: nn.Module,
    plan: ParallelPlan,
    *,
    model: str,
    tp: int,
    pp: int,
    pp_split: Sequence[int] | None = None,
    quantization: Quantization | None = None,
) -> PlanReport:
    """Resolve and check a plan.

    Args:
        module: the model, on "meta" or not.
        plan: for it.
        model: how the user calls it.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        pp_split: layers per stage; None: balanced.
        quantization: of its weights, when it serves.
    """
    groups = unit_groups(module, plan)
    subject = Subject(
        module=module, plan=plan, tp=tp, pp=pp, pp_split=pp_split, groups=groups, quantization=quantization
    )
    found = check(subject)
    try:
        table: ShardTable | None = subject.table
    except PlanError:  # which the check has a finding for
        table = None
    return PlanReport(model=model, tp=tp, pp=pp, plan=plan, table=table, check=found, tree=structure_tree(module, plan))

"""The check: all families of findings over one model and one plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.check.composition import check_composition
from shardwright.plans.check.coverage import check_coverage
from shardwright.plans.check.entries import check_entries
from shardwright.plans.check.findings import CheckReport, Finding, Severity, merged
from shardwright.plans.check.heads import check_deal
from shardwright.plans.check.pipeline import check_pipeline
from shardwright.plans.check.stages import check_stages
from shardwright.plans.check.subject import Subject
from shardwright.plans.check.sums import check_sums
from shardwright.plans.check.tied import check_tied_cuts
from shardwright.plans.choose import Given, choose_plan
from shardwright.plans.groups import UnitGroup
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.stack import find_stack
from shardwright.plans.units import unit_groups

logger = logging.getLogger(__name__)

TP_FAMILIES = (check_composition, check_entries, check_sums, check_tied_cuts, check_coverage, check_deal)


def check_plan(
    module: nn.Module,
    plan: ParallelPlan | None = None,
    *,
    tp: int = 2,
    pp: int = 2,
    pp_split: Sequence[int] | None = None,
    groups: Sequence[UnitGroup] | None = None,
) -> CheckReport:
    """Say what is wrong with a plan, without weights and without running it.

    Args:
        module: the model, on "meta" or not.
        plan: None: the model's own, or an inferred one.
        tp: tensor-parallel ranks; nothing is cut for 1, and that part is not checked.
        pp: pipeline stages, likewise.
        pp_split: layers per stage; None: balanced.
        groups: of `plans.units.unit_groups`, if they are at hand.

    Raises: PlanError if the model carries a plan that cannot be read.
    """
    if plan is None:
        plan = choose_plan(module, tp=tp, pp=pp)
    if groups is None:
        groups = unit_groups(module, plan)
    return check(Subject(module=module, plan=plan, tp=tp, pp=pp, pp_split=pp_split, groups=groups))


def check(subject: Subject) -> CheckReport:
    """All that there is to say of a model and its plan."""
    return CheckReport(merged(_findings(subject)))


def _findings(subject: Subject) -> Iterator[Finding]:
    found: list[Finding] = []
    if subject.tp > 1:
        found += [finding for family in TP_FAMILIES for finding in family(subject)]
    if subject.pp > 1:
        of_pipeline = list(check_pipeline(subject))
        found += of_pipeline
        if not _is_wrong(of_pipeline):
            found += check_stages(subject)
    yield from found
    if not _is_wrong(found):
        try:
            _ = subject.table
        except PlanError as error:
            yield Finding(Severity.ERROR, "plan", str(error))


def _is_wrong(findings: Sequence[Finding]) -> bool:
    return any(finding.severity is Severity.ERROR for finding in findings)


def validate_plans(
    model: nn.Module,
    tp_plan: Given | None = None,
    pp_plan: Given | None = None,
    strict: bool = False,
    *,
    tp: int = 2,
    pp: int | None = None,
) -> CheckReport:
    """Check the plans of a module in hand.

    Args:
        model: on "meta" or with weights.
        tp_plan, pp_plan: mappings or files; None: the model's own, or an inferred one.
        strict: raise if something is wrong.
        tp: tensor-parallel ranks to check for.
        pp: pipeline stages; None: 2, if the model has as many layers.

    Returns: a report that is true if the plans are right.
    Raises: PlanError if a plan cannot be read; if `strict`, also for errors that were found.
    """
    if pp is None:
        pp = default_stages(model)
    plan = choose_plan(model, tp_file=tp_plan, pp_file=pp_plan, tp=tp, pp=pp)
    report = check_plan(model, plan, tp=tp, pp=pp)
    if strict and not report.ok:
        raise PlanError("; ".join(error.line for error in report.of(Severity.ERROR)))
    return report


def default_stages(module: nn.Module) -> int:
    """Pipeline stages to look at where nobody says how many: 2, or 1 of a model without that many layers."""
    stack = find_stack(module)
    return 2 if stack is not None else 1

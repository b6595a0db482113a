"""Mistakes planted in good plans are found, and plans that are right raise no error."""

from __future__ import annotations

from functools import cache

import pytest
from tests.plans.mutations import ARCHITECTURES, MUTATIONS, Mutation, build
from torch import nn

from shardwright.plans import CheckReport, check_plan
from shardwright.plans.choose import choose_plan
from shardwright.plans.groups import UnitGroup
from shardwright.plans.plan import plan_of
from shardwright.plans.units import unit_groups

GOOD = ("semantic", "semantic dict", "semantic tied")

QUICK = (
    "llama",
    "gpt2",
    "gpt_oss",
    "bloom",
    "mixtral",
    "gemma2",
    "phi3",
    "qwen3_moe",
    "deepseek_v3",
    "cohere2",
    "olmo2",
    "llama4_text",
)


@cache
def model(name: str) -> tuple[nn.Module, list[UnitGroup]]:
    """A model and its groups, which no plan changes."""
    module = build(name)
    return module, unit_groups(module, plan_of(module))


def found(mutation: Mutation) -> CheckReport:
    module, groups = model(mutation.model)
    plan = mutation.apply(plan_of(module))
    return check_plan(module, plan, tp=mutation.tp, pp=mutation.pp, pp_split=mutation.pp_split, groups=groups)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_a_mistake_is_found_and_its_entry_named(mutation: Mutation) -> None:
    report = found(mutation)
    guilty = [finding for finding in report.findings if finding.where == mutation.guilty]
    assert [str(finding.severity) for finding in guilty] == [mutation.severity], report.text
    assert guilty[0].fix or mutation.severity != "error"
    assert report.findings[0].where == mutation.guilty, report.text
    assert report.ok == (mutation.severity != "error")


def test_one_mistake_is_one_finding() -> None:
    several = {
        mutation.id: [finding.where for finding in report.findings if finding.severity == "error"]
        for mutation in MUTATIONS
        if len((report := found(mutation)).findings) and sum(f.severity == "error" for f in report.findings) > 1
    }
    assert not several


@pytest.mark.parametrize(
    "name", [*GOOD, *(pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ARCHITECTURES)]
)
def test_plans_that_are_right_raise_no_error(name: str) -> None:
    """Those that models carry, and those that are inferred."""
    module, groups = model(name)
    report = check_plan(module, choose_plan(module, tp=2, pp=2), tp=2, pp=2, groups=groups)
    assert report.ok, report.text

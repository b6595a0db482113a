"""Parallel plans as values: read, resolved, inferred, checked and proved. Knows no engine.

    from shardwright.plans import infer_plan, check_plan, prove_plan, print_model_structure, validate_plans

The names below are imported when they are first used: what only carries out a plan loads neither the check nor the
proof.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.plans.check import CheckReport, Finding, check_plan, validate_plans
    from shardwright.plans.choose import choose_plan
    from shardwright.plans.infer import infer_plan
    from shardwright.plans.plan import ParallelPlan
    from shardwright.plans.prove import ProofReport, prove_plan
    from shardwright.plans.tree_text import print_model_structure

__all__ = [
    "CheckReport",
    "Finding",
    "ParallelPlan",
    "ProofReport",
    "check_plan",
    "choose_plan",
    "infer_plan",
    "print_model_structure",
    "prove_plan",
    "validate_plans",
]

_HOME = {
    "CheckReport": "check",
    "Finding": "check",
    "ParallelPlan": "plan",
    "ProofReport": "prove",
    "check_plan": "check",
    "choose_plan": "choose",
    "infer_plan": "infer",
    "print_model_structure": "tree_text",
    "prove_plan": "prove",
    "validate_plans": "check",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'shardwright.plans' has no attribute {name!r}")
    return getattr(import_module(f"shardwright.plans.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

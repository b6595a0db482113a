"""Which plan a model is cut by: the one rule that the command line, the worker and the check share.

A file or argument replaces the model's own plan; of the model's own, entries on modules override those on the config;
only where there is none is one inferred. Tensor and pipeline parallelism are each chosen as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.patterns import matches
from shardwright.plans.plan import KEYS, ParallelPlan, parse_plan, plan_of, read_plan, with_overrides
from shardwright.plans.stack import LayerStack, find_stack

Given = str | Path | Mapping[str, Any] | ParallelPlan
"""A plan that somebody gives: a file, what a file holds, or a plan."""


def choose_plan(
    module: nn.Module,
    *,
    tp_file: Given | None = None,
    pp_file: Given | None = None,
    tp: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
) -> ParallelPlan:
    """The plan of a model for so many ranks.

    Args:
        module: the model, on "meta" or not.
        tp_file, pp_file: replace the model's own plan.
        tp, pp: nothing is inferred for a single rank.
        expert_parallel: deal out whole experts where the model has a plan for it.

    Raises: PlanError if a plan cannot be read, or is of the wrong type.
    """
    own = plan_of(module, expert_parallel=expert_parallel)
    given_tp = read_given(tp_file, module, part="tp_plan")
    given_pp = read_given(pp_file, module, part="pp_plan")
    wants_tp = tp > 1 and given_tp is None and not is_plan_of_layers(module, own.tp)
    wants_pp = pp > 1 and given_pp is None and not is_plan_of_layers(module, own.pp)
    if wants_tp or wants_pp:
        from shardwright.plans.infer import infer_plan  # traces the model

        inferred = infer_plan(module)
        given_tp = inferred if wants_tp else given_tp
        given_pp = inferred if wants_pp else given_pp
    return with_overrides(own, tp=given_tp, pp=given_pp)


def read_given(given: Given | None, module: nn.Module, *, part: str) -> ParallelPlan | None:
    """A plan that somebody gives for one part of the whole; None if nobody does.

    Args:
        given: the plan.
        module: the model that it is for.
        part: `tp_plan` or `pp_plan`, which it must have.

    Raises: PlanError if it cannot be read, or lacks the part.
    """
    if given is None or isinstance(given, ParallelPlan):
        return given
    if isinstance(given, Mapping):
        where = part
        document = given if any(key in given for key in KEYS) else {part: given}
        plan = parse_plan(document, where=where, source="argument", module=module)
    else:
        where = f"plan file {given}"
        plan = read_plan(given, module=module)
    if (plan.tp_source if part == "tp_plan" else plan.pp_source) == "none":
        raise PlanError(f"{where} has no {part}")
    return plan


def is_plan_of_layers(module: nn.Module, names: Collection[str]) -> bool:
    """Whether a model's own plan is more than entries for its head.

    Classes of Transformers plan their head; if the config plans nothing else, the model has no plan. One whose names
    are not in the model is a plan nevertheless: a wrong one.
    """
    stack = find_stack(module)
    if stack is None:
        return bool(names)
    inside, outside = _places(module, stack)
    return any(
        any(matches(pattern, name) for name in inside) or not any(matches(pattern, name) for name in outside)
        for pattern in names
    )


def _places(module: nn.Module, stack: LayerStack) -> tuple[list[str], list[str]]:
    """Names of modules and parameters in the layers, their container among them, and of all others."""
    names = [name for name, _ in module.named_modules()]
    names += [name for name, _ in module.named_parameters(remove_duplicate=False)]
    layers, depth = set(stack.layers), stack.layers[0].count(".") + 1
    inside: list[str] = []
    outside: list[str] = []
    for name in names:
        is_inside = name == stack.container or ".".join(name.split(".")[:depth]) in layers
        (inside if is_inside else outside).append(name)
    return inside, outside

"""Makes a plan for a model that carries none, from one forward pass of its code.

words       what is cut, from the groups of `plans.flow`, as patterns and the words of styles
pipeline    the modules that follow each other, in the order in which they were called
"""

from __future__ import annotations

import logging

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.flow.follow import follow
from shardwright.plans.flow.skeleton import trace_forward
from shardwright.plans.infer.pipeline import pipeline_of
from shardwright.plans.infer.words import words_of
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.stack import find_stack

logger = logging.getLogger(__name__)

__all__ = ["infer_plan"]


def infer_plan(module: nn.Module) -> ParallelPlan:
    """A plan for a model, found by following its dataflow.

    Args:
        module: the model, on "meta" or not; stays as it is.

    Raises: PlanError if its code runs neither on "meta" nor with made-up weights.
    """
    try:
        trace = trace_forward(module)
    except Exception as exc:  # of the module's code
        raise PlanError(
            "no plan can be inferred, for a forward pass of a few tokens fails without weights "
            f"({type(exc).__name__}: {exc}): give one with --tp-plan and --pp-plan"
        ) from exc
    tp = words_of(module, follow(module, trace))
    pp = pipeline_of(module, trace)
    stack = find_stack(module)
    layers = stack.layers if stack is not None else ()
    return ParallelPlan(
        tp=tp,
        pp=pp,
        no_split=frozenset(type(module.get_submodule(layer)).__name__ for layer in layers),
        tp_source="inferred",
        pp_source="inferred",
    )

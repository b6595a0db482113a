"""The unit groups of a model."""

from __future__ import annotations

import logging

from torch import nn

from shardwright.plans.flow.follow import follow
from shardwright.plans.flow.skeleton import trace_forward
from shardwright.plans.groups import UnitGroup
from shardwright.plans.names import groups_by_names
from shardwright.plans.plan import ParallelPlan

logger = logging.getLogger(__name__)


def unit_groups(module: nn.Module, plan: ParallelPlan) -> list[UnitGroup]:
    """What must be cut together in a model, and in which units.

    Found by following its dataflow; by names and shapes, with a warning, if its code does not run without weights.
    """
    try:
        trace = trace_forward(module)
    except Exception as exc:  # of the module's code
        logger.warning(
            "what must be cut together is guessed from names, for a pass without weights fails: %s: %s",
            type(exc).__name__,
            exc,
        )
        return groups_by_names(module, plan)
    return follow(module, trace).groups

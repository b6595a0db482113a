"""The unit groups of a model."""

from __future__ import annotations

from torch import nn

from shardwright.plans.groups import UnitGroup
from shardwright.plans.names import groups_by_names
from shardwright.plans.plan import ParallelPlan


def unit_groups(module: nn.Module, plan: ParallelPlan) -> list[UnitGroup]:
    """What must be cut together in a model, and in which units."""
    return groups_by_names(module, plan)

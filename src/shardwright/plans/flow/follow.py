"""From a recorded forward pass to the groups of the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shardwright.plans.flow.collect import collect
from shardwright.plans.flow.kinds import Kinds, kinds_of
from shardwright.plans.flow.propagate import propagate
from shardwright.plans.flow.record import Trace
from shardwright.plans.flow.state import Flow
from shardwright.plans.groups import UnitGroup
from shardwright.plans.stack import find_stack


@dataclass(frozen=True, slots=True)
class Followed:
    """What following a model's dataflow showed."""

    flow: Flow
    """Of one layer of each kind, and all that is around the layers."""
    kinds: Kinds
    groups: list[UnitGroup]
    """Of all layers."""


def follow(module: nn.Module, trace: Trace) -> Followed:
    """Follow the dataflow of a model.

    Args:
        module: the model.
        trace: of a forward pass of it.
    """
    stack = find_stack(module)
    kinds = kinds_of(trace, stack.layers if stack is not None else ())
    flow = propagate(kinds.trace)
    if not kinds.hold(flow):
        kinds = Kinds(trace, {})
        flow = propagate(trace)
    return Followed(flow, kinds, kinds.groups(collect(flow)))

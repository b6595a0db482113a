"""The modules that a pipeline is made of, in the order in which a forward pass called them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from shardwright.plans.flow.record import Call, Ref, Trace
from shardwright.plans.plan import PipelineEntry
from shardwright.plans.stack import LayerStack, find_stack, stack_in


@dataclass(frozen=True, slots=True)
class Order:
    """Modules around the layers, by name, in the order of their calls."""

    before: tuple[str, ...]
    between: tuple[str, ...]
    """Of these no pipeline is made."""
    after: tuple[str, ...]


def pipeline_of(module: nn.Module, trace: Trace) -> dict[str, PipelineEntry]:
    """The pipeline part of a plan; empty if nothing repeats, or the layers were not called one after another."""
    stack = find_stack(module)
    if stack is None:
        return {}
    calls = [call for call in trace.calls if call.module in stack.layers]
    if not calls:
        return {}
    order = order_of(module, trace, stack)
    if order.between:
        return {}
    carried = _carried(calls)
    entries = {name: _entry(module, trace, name, carried) for name in order.before}
    entries[container_of(module, stack)] = PipelineEntry(_inputs(calls[0], carried), (carried,))
    entries |= {name: _entry(module, trace, name, carried) for name in order.after}
    if order.after:
        last = order.after[-1]
        if _returns(trace, last):
            entries[last] = PipelineEntry(entries[last].inputs, ("logits",))
    return entries


def order_of(module: nn.Module, trace: Trace, stack: LayerStack) -> Order:
    """Modules with parameters that are called before the first layer, and after the last.

    They are named where they stand beside the layers or what holds these. After the layers, so is what has no
    parameters but takes what these gave, such as a plain norm.
    """
    numbers = [number for number, call in enumerate(trace.calls) if call.module in stack.layers]
    above = {".".join(stack.layers[0].split(".")[:depth]) for depth in range(stack.layers[0].count(".") + 1)}
    given = {ref.storage for ref in trace.calls[numbers[-1]].outputs}
    before: dict[str, None] = {}
    between: dict[str, None] = {}
    after: dict[str, None] = {}
    for number, call in enumerate(trace.calls):
        parent = trace.calls[call.parent].module if call.parent is not None else None
        if parent not in above or call.module in above or call.module in stack.layers:
            continue
        takes = {value.storage for value in call.arguments.values() if isinstance(value, Ref)}
        if next(module.get_submodule(call.module).parameters(), None) is None and not takes & given:
            continue
        if number < numbers[0]:
            before[call.module] = None
        elif number < numbers[-1]:
            between[call.module] = None
        elif call.module not in before:
            after[call.module] = None
            given |= {ref.storage for ref in call.outputs}
    return Order(tuple(before), tuple(between), tuple(after))


def container_of(module: nn.Module, stack: LayerStack) -> str:
    """The name under which `stack_in` finds the layers."""
    if stack.container and (found := stack_in(module, stack.container)) is not None and found.layers == stack.layers:
        return stack.container
    return re.sub(r"[_.]*\d+$", "", stack.layers[0])


def _carried(calls: Sequence[Call]) -> str:
    """The argument in which a layer takes what the one before it gave."""
    for one, other in pairwise(calls):
        given = {ref.storage for ref in one.outputs}
        for name, value in other.arguments.items():
            if isinstance(value, Ref) and value.storage in given:
                return name
    return next((name for name, value in calls[0].arguments.items() if isinstance(value, Ref)), "hidden_states")


def _inputs(call: Call, carried: str) -> tuple[str, ...]:
    """Arguments of a layer that are tensors, the carried one first."""
    names = [name for name, value in call.arguments.items() if isinstance(value, Ref) and name != carried]
    return (carried, *names)


def _entry(module: nn.Module, trace: Trace, name: str, carried: str) -> PipelineEntry:
    """What a module takes and gives: the model's own arguments by their names, all else as the layers call it."""
    call = next(call for call in trace.calls if call.module == name)
    own = {ref.storage: argument for argument, ref in trace.inputs.items()}
    is_builtin = type(module.get_submodule(name)).__module__.startswith("torch.nn.")

    def named(argument: str, value: Any) -> str | None:
        if not isinstance(value, Ref):
            return None
        if value.storage in own:
            return own[value.storage]
        return carried if is_builtin else argument

    inputs = [found for argument, value in call.arguments.items() if (found := named(argument, value)) is not None]
    return PipelineEntry(tuple(dict.fromkeys(inputs)), (carried,))


def _returns(trace: Trace, name: str) -> bool:
    """Whether the model returns what a module gives."""
    call = next(call for call in reversed(trace.calls) if call.module == name)
    return bool({ref.storage for ref in call.outputs} & {ref.storage for ref in trace.outputs})

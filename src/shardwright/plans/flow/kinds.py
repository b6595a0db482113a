"""Layers that do the same with other weights: one of each kind is followed, the others are as it is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwright.plans.flow.products import refs_of
from shardwright.plans.flow.record import Call, Exit, Op, Ref, Trace
from shardwright.plans.flow.state import Flow
from shardwright.plans.groups import UnitGroup


@dataclass(frozen=True, slots=True)
class Kinds:
    """A trace without what repeats itself."""

    trace: Trace
    twins: dict[str, list[str]]
    """Layer that is followed, to those that are like it."""

    def names(self, name: str) -> list[str]:
        """A qualified name, and the same in all layers that are like its own."""
        for layer, others in self.twins.items():
            if name == layer or name.startswith(f"{layer}."):
                return [name, *(other + name[len(layer) :] for other in others)]
        return [name]

    def groups(self, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
        """Groups of what was followed, and of what is like it."""
        made = []
        for group in groups:
            made.append(group)
            names = [self.names(member.name)[1:] for member in group.members]
            made += [
                replace(group, members=tuple(replace(m, name=n) for m, n in zip(group.members, other, strict=True)))
                for other in zip(*names, strict=False)
            ]
        return made

    def hold(self, flow: Flow) -> bool:
        """Whether layers that have twins take and give only what every rank has."""
        return all(
            flow.memory.labels(ref) is None
            for call in flow.trace.calls
            if call.module in self.twins
            for ref in _edges(self.trace, call)
        )


def kinds_of(trace: Trace, layers: Iterable[str]) -> Kinds:
    """Leave out the calls of layers that do the same as an earlier one."""
    known = set(layers)
    counts = Counter(call.module for call in trace.calls)
    first: dict[Hashable, str] = {}
    twins: dict[str, list[str]] = defaultdict(list)
    dropped: list[Call] = []
    for call in trace.calls:
        if call.module in known and counts[call.module] == 1:
            layer = first.setdefault(_signature(trace, call), call.module)
            if layer != call.module:
                twins[layer].append(call.module)
                dropped.append(call)
    gone = {number for call in dropped for number in range(call.first, call.stop)}
    kept = [event for number, event in enumerate(trace.events) if number not in gone]
    used = {ref.storage for event in kept if isinstance(event, Op) for ref in refs_of(event)}
    refs = {name: ref for name, ref in trace.refs.items() if ref.storage in used}
    return Kinds(replace(trace, events=kept, refs=refs), dict(twins))


def _signature(trace: Trace, call: Call) -> Hashable:
    """What a call does, with its tensors by the order in which they turn up, and names as seen from its module."""
    numbers: dict[int, int] = {}

    def place(value: Any) -> Hashable:
        if isinstance(value, Ref):
            number = numbers.setdefault(value.storage, len(numbers))
            name = trace.parameters.get(value.storage)
            return number, value.size, value.stride, value.offset, name and _seen_from(call.module, name)
        if isinstance(value, list | tuple):
            return tuple(place(v) for v in value)
        return repr(value)

    made: list[Hashable] = []
    for event in trace.events[call.first : call.stop]:
        where = _seen_from(call.module, trace.calls[event.call].module)
        if isinstance(event, Exit):
            made.append(where)
        else:
            given = tuple(place(v) for v in (*event.args, *event.kwargs.values()))
            made.append((where, event.name, given, tuple(event.kwargs), place(event.outputs)))
    return tuple(made)


def _seen_from(module: str, name: str) -> str:
    return name[len(module) :] if name == module or name.startswith(f"{module}.") else f"/{name}"


def _edges(trace: Trace, call: Call) -> Iterable[Ref]:
    """Tensors that a call takes from elsewhere or leaves to others."""
    yield from call.outputs
    yield from (value for value in call.arguments.values() if isinstance(value, Ref))

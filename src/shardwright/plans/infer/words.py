"""From groups to the patterns and words of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from shardwright.plans.flow.follow import Followed
from shardwright.plans.flow.state import Flow
from shardwright.plans.groups import Member, UnitGroup, UnitKind
from shardwright.plans.patterns import generalize
from shardwright.plans.resolve import has_inputs_first
from shardwright.plans.stack import find_stack
from shardwright.plans.styles import (
    COLUMN,
    COLUMN_GATHERED,
    LOCAL_ROW,
    PACKED_COLUMN,
    PACKED_ROW,
    ROW,
    SUM,
    VOCABULARY,
)

SMALL = 4
"""A linear that cannot be part of a group is cut, and its output put together, if its weight is not this many times
smaller than one from hidden size to hidden size: else exchanging costs more than it saves."""

SUM_OF_EXPERTS = "moe_tp_experts"


def words_of(module: nn.Module, followed: Followed) -> dict[str, str]:
    """The tensor-parallel part of a plan: patterns to words, in the order of the model's modules."""
    flow, words = followed.flow, dict[str, str]()
    for group in followed.groups:
        if any(member.name not in flow.trace.refs for member in group.members):
            continue  # of a layer that is like another
        if group.kind in (UnitKind.HEADS, UnitKind.FEATURES):
            words |= _cut(module, flow, group)
        elif group.kind is UnitKind.VOCABULARY:
            words |= _vocabulary(module, flow, group)
    words |= {name: ROW.name for name in flow.once if not is_linear(module.get_submodule(name.rpartition(".")[0]))}
    words |= _gathered(module, flow, words)
    return _patterns(
        module, flow, {other: word for name, word in words.items() for other in followed.kinds.names(name)}
    )


def is_linear(owner: nn.Module) -> bool:
    """Whether a module is a product with its weight and nothing else."""
    return isinstance(owner, nn.Linear) or has_inputs_first(owner)


def _cut(module: nn.Module, flow: Flow, group: UnitGroup) -> dict[str, str]:
    """Words of a group whose columns end in rows, by qualified names of modules and parameters."""
    closed_in = {c.origin: flow.trace.calls[c.call].module for c in flow.closings if c.origin is not None}
    segments: dict[tuple[str, int], int] = defaultdict(int)
    for member in group.members:
        segments[member.name, member.dim] += len(member.segments)
    parted = {(m.name, m.dim) for m in group.members if m.units > 1 or m.span is not None}
    words: dict[str, str] = {}
    if not all(_has_word(module, flow, *key) for key in parted):
        return {}
    for member in group.members:
        if (member.name, member.dim) not in parted:
            continue  # every rank has all of it
        owner_name, _, leaf = member.name.rpartition(".")
        owner = module.get_submodule(owner_name)
        summed_by = closed_in.get((member.name, member.dim))
        is_packed = segments[member.name, member.dim] > 1
        if summed_by is not None and (summed_by != owner_name or not is_linear(owner)):
            rank = len(flow.trace.refs[member.name].size)
            words[summed_by] = SUM_OF_EXPERTS if rank > 2 else SUM.name
        if not is_linear(owner):
            words[member.name] = _word_of_parameter(flow, member, is_row=summed_by is not None, is_packed=is_packed)
        elif summed_by is not None:
            words[owner_name] = ROW.name if summed_by == owner_name else LOCAL_ROW.name
        elif leaf == "weight":
            words[owner_name] = PACKED_COLUMN.name if is_packed else COLUMN.name
    return words


def _has_word(module: nn.Module, flow: Flow, name: str, dim: int) -> bool:
    """Whether a word cuts a parameter along a dimension: those that there are know the last two."""
    rank = len(flow.trace.refs[name].size)
    return dim >= rank - 2 or isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Conv1d)


def _word_of_parameter(flow: Flow, member: Member, *, is_row: bool, is_packed: bool) -> str:
    """The word that cuts a parameter outside of linear modules along the right dimension, the last or that before."""
    rank = len(flow.trace.refs[member.name].size)
    is_bias = rank == 2 and member.name.endswith("_bias")
    if rank - 1 == member.dim > 0 and not is_bias:
        if is_row:
            return ROW.name
        return PACKED_ROW.name if is_packed else LOCAL_ROW.name
    return PACKED_COLUMN.name if is_packed else COLUMN.name


def _vocabulary(module: nn.Module, flow: Flow, group: UnitGroup) -> dict[str, str]:
    """Words of a table of tokens and of a head, which may be one parameter of two modules."""
    called = {call.module for call in flow.trace.calls}
    name = group.members[0].name
    parameter = module.get_parameter(name)
    words = {}
    for owner_name, owner in module.named_modules():
        if getattr(owner, "weight", None) is not parameter or owner_name not in called:
            continue
        if isinstance(owner, nn.Embedding):
            words[owner_name] = VOCABULARY.name
        elif is_linear(owner):
            words[owner_name] = COLUMN_GATHERED.name
    return words


def _gathered(module: nn.Module, flow: Flow, words: Mapping[str, str]) -> dict[str, str]:
    """Words of large linears in layers that are in no group: something after them needs all of their output."""
    stack = find_stack(module)
    hidden = max((flow.trace.refs[name].size[-1] for name in flow.tables), default=0)
    if stack is None or not hidden:
        return {}
    found = {}
    for call in flow.trace.calls:
        name = call.module
        owner = module.get_submodule(name)
        inside = any(name.startswith(f"{layer}.") for layer in stack.layers)
        if inside and name not in words and is_linear(owner):
            weight = owner.weight
            assert isinstance(weight, nn.Parameter)
            if f"{name}.weight" not in flow.trace.refs:
                continue  # of a layer that is like another
            if weight.numel() * SMALL >= hidden * hidden and min(weight.shape) * SMALL >= min(hidden, *weight.shape):
                found[name] = COLUMN_GATHERED.name
    return found


def _patterns(module: nn.Module, flow: Flow, words: Mapping[str, str]) -> dict[str, str]:
    """Names as patterns, if all that a pattern names have one word; what never ran goes with the others.

    `*` stands for every number, or else for that of the layer, or else for none.
    """
    called = {call.module for call in flow.trace.calls}
    names = [name for name, _ in module.named_modules() if name in called]
    names += [name for name, _ in module.named_parameters(remove_duplicate=False)]
    stack = find_stack(module)
    layers = stack.layers if stack is not None else ()

    def of_layer(name: str) -> str:
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        return name if layer is None else generalize(layer) + name[len(layer) :]

    plan: dict[str, str] = {}
    for way in (generalize, of_layer, str):
        by_pattern: dict[str, set[str | None]] = defaultdict(set)
        for name in names:
            by_pattern[way(name)].add(words.get(name))
        for name in list(names):
            found = by_pattern[way(name)]
            if len(found) == 1:
                names.remove(name)
                if (word := words.get(name)) is not None:
                    plan[way(name)] = word
    return plan

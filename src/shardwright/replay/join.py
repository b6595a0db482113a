"""Put products of the same input next to each other: they are carried out as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardwright.replay.affine import Call, Place, Recording, tensors_in
from shardwright.replay.fold import written_by
from shardwright.replay.instructions import Instruction, Operation

_INPUT = {
    "aten::linear": 0,
    "shardwright::packed_linear": 0,
    "shardwright::coded_linear": 0,
    "aten::mm": 0,
    "aten::addmm": 1,
}
"""Products, and which of their arguments is multiplied."""


def gathered(calls: Sequence[Call], recording: Recording) -> list[Call]:
    """The same calls, products with weights as early as the first one with the same input.

    Such are queries, keys and values, or both sides of a gated layer, wherever code computes them.
    """
    result: list[Call] = []
    for call in calls:
        result.insert(_earliest(call, result, recording), call)
    return result


def joined(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same instructions, products marked that are carried out with the one before."""
    result: list[Instruction] = []
    for instruction in instructions:
        if result and _share_input(result[-1], instruction):
            instruction = replace(instruction, values=(1, *instruction.values[1:]))
        result.append(instruction)
    return result


def _earliest(call: Call, calls: list[Call], recording: Recording) -> int:
    """Where a call can stand among those before it."""
    multiplied = _multiplied(call)
    others = [place for place in tensors_in((call.args, call.kwargs), Place) if place != multiplied]
    if multiplied is None or any(place.storage not in recording.constants for place in others):
        return len(calls)
    made = {place.storage for place in tensors_in(call.output, Place)}
    for number in range(len(calls) - 1, -1, -1):
        before = calls[number]
        if _multiplied(before) == multiplied:
            return number + 1
        used = {place.storage for place in tensors_in((before.args, before.kwargs, before.output), Place)}
        if multiplied.storage in written_by(before) or used & made:
            break
    return len(calls)


def _multiplied(call: Call) -> Place | None:
    schema: Any = getattr(call.function, "_schema", None)
    number = None if schema is None else _INPUT.get(schema.name)
    return None if number is None else call.args[number]


def _share_input(one: Instruction, other: Instruction) -> bool:
    if one.operation is not Operation.LINEAR or other.operation is not Operation.LINEAR:
        return False
    (_, input_one, weight_one, _), (_, input_other, weight_other, _) = one.tensors, other.tensors
    assert weight_one is not None
    assert weight_other is not None
    is_alike = weight_one.dtype is weight_other.dtype and one.values[1:] == other.values[1:]
    return input_one == input_other and is_alike

"""Compute once what does not depend on the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.replay.affine import Affine, Call, Place, Recording, tensors_in
from shardwright.replay.trace import Attend, WriteCache, mapped


def folded(recording: Recording) -> list[Call]:
    """The calls of a step that depend on it; results of others become constants of the recording."""
    writes = Counter(storage for call in recording.calls for storage in written_by(call))
    if any(storage in recording.constants for storage in writes):
        raise UnsupportedModelError("its code changes what it keeps from step to step")
    calls = []
    for call in recording.calls:
        inputs = tensors_in((call.args, call.kwargs), Place)
        if not tensors_in(call.output, Place) and all(place.storage in recording.constants for place in inputs):
            continue  # a look at a number that is always the same
        if isinstance(call.function, WriteCache | Attend):
            calls.append(call)
            continue
        if torch.Tag.nondeterministic_seeded in call.function.tags:
            raise UnsupportedModelError(f"its code draws random numbers ({call.function})")
        if not _is_constant(call, recording, writes):
            calls.append(call)
            continue
        arguments = (call.args, call.kwargs)
        args, kwargs = mapped(arguments, Place, lambda place: constant_tensor(place, recording))
        results = tensors_in(call.function(*args, **kwargs), Tensor)
        for place, result in zip(tensors_in(call.output, Place), results, strict=True):
            recording.constants[place.storage] = result
    return calls


def written_by(call: Call) -> set[int]:
    """Storages that a call makes, or changes."""
    given = {place.storage for place in tensors_in((call.args, call.kwargs), Place)}
    written = {place.storage for place in tensors_in(call.output, Place)} - given
    if not isinstance(call.function, WriteCache | Attend):
        for number, argument in enumerate(call.function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = call.kwargs.get(argument.name, call.args[number] if number < len(call.args) else None)
                written |= {place.storage for place in tensors_in(value, Place)}
    return written


def _is_constant(call: Call, recording: Recording, writes: Mapping[int, int]) -> bool:
    inputs: list[Place] = tensors_in((call.args, call.kwargs), Place)
    outputs: list[Place] = tensors_in(call.output, Place)
    fields: Any = (call.args, call.kwargs, [(p.sizes, p.strides, p.offset) for p in (*inputs, *outputs)])
    is_fixed = not any(number.slope for number in tensors_in(fields, Affine))
    fresh = {place.storage for place in outputs} - {place.storage for place in inputs}
    return (
        is_fixed
        and bool(fresh)
        and len(fresh) == len(outputs)
        and all(place.storage in recording.constants for place in inputs)
        and all(
            writes[storage] == 1 and place.offset == Affine(0) for storage, place in zip(fresh, outputs, strict=True)
        )
    )


def constant_tensor(place: Place, recording: Recording) -> Tensor:
    """A tensor that does not depend on the step."""
    sizes, strides, offset = place.at(0)
    storage = recording.constants[place.storage].untyped_storage()
    return torch.empty(0, dtype=place.dtype).set_(storage, offset, sizes, strides)

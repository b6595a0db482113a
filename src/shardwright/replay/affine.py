"""Sizes as functions of the number of tokens, found by comparing traces of steps of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.replay.trace import Attend, Noted, SeenCall, SeenTensor, Trace, WriteCache, mapped


@dataclass(frozen=True, slots=True)
class Affine:
    """base + slope * T for a step of T tokens."""

    base: int
    slope: int = 0

    def at(self, num_tokens: int) -> int:
        """For a step of so many tokens."""
        return self.base + self.slope * num_tokens

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.base + other.base, self.slope + other.slope)

    def __mul__(self, factor: int) -> Affine:
        return Affine(self.base * factor, self.slope * factor)


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a recording: where it lies and how, for any number of tokens."""

    storage: int
    dtype: torch.dtype
    sizes: tuple[Affine, ...]
    strides: tuple[Affine, ...]
    offset: Affine
    """In elements."""

    def at(self, num_tokens: int) -> tuple[list[int], list[int], int]:
        """Sizes, strides and offset for a step of so many tokens."""
        return (
            [s.at(num_tokens) for s in self.sizes],
            [s.at(num_tokens) for s in self.strides],
            self.offset.at(num_tokens),
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of a recording, as SeenCall; ints that depend on the number of tokens are Affine."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True, slots=True)
class Recording:
    """What steps of several sizes have in common."""

    calls: list[Call]
    storage_bytes: list[Affine]
    """By the number of a storage."""
    constants: dict[int, Tensor]
    """Tensors that are there before the step, by the number of their storage: weights, buffers, tables."""
    inputs: dict[str, int]
    output: Place


MOST_CONSTANT_ELEMENTS = 1 << 16
"""Of a tensor that code makes anew in each step, with the same numbers: more are not compared."""


def common_recording(traces: Sequence[Trace]) -> Recording:
    """What traces have in common.

    Args:
        traces: of steps of different sizes, at least three; or of one size, for a recording of that size alone.

    Raises: UnsupportedModelError if they are not alike, or depend on the number of tokens in another way.
    """
    lengths = [trace.num_tokens for trace in traces]
    traces = [pruned(trace) for trace in traces]
    first = traces[0]
    if any(len(trace.calls) != len(first.calls) or len(trace.tensors) != len(first.tensors) for trace in traces):
        raise UnsupportedModelError("its code does not do the same in every step")
    calls = [common_call([trace.calls[i] for trace in traces], lengths) for i in range(len(first.calls))]
    produced = _produced(first)
    constants = {}
    for number in range(len(first.tensors)):
        if number not in produced and number not in first.inputs.values():
            constants[number] = common_constant([trace.tensors[number] for trace in traces])
    sizes = [
        _fit([trace.tensors[number].untyped_storage().nbytes() for trace in traces], lengths)
        for number in range(len(first.tensors))
    ]
    output = common([trace.output for trace in traces], lengths)
    return Recording(calls, sizes, constants, first.inputs, output)


def pruned(trace: Trace) -> Trace:
    """A trace without what has no effect: views, and numbers that nobody uses, such as masks for attention of ours.

    Storages get new numbers, in the order in which they are still seen.
    """
    assert trace.output is not None
    live = {trace.output.storage}
    calls: list[SeenCall] = []
    for call in reversed(trace.calls):
        outputs = {tensor.storage for tensor in tensors_in(call.output, SeenTensor)}
        inputs = {tensor.storage for tensor in tensors_in((call.args, call.kwargs), SeenTensor)}
        if (
            isinstance(call.function, WriteCache)
            or not outputs
            or (outputs & live and not is_view(call, inputs, outputs))
        ):
            calls.append(call)
            live |= inputs
    calls.reverse()
    numbers: dict[int, int] = {number: place for place, number in enumerate(trace.inputs.values())}

    def renumbered(tensor: SeenTensor) -> SeenTensor:
        number = numbers.setdefault(tensor.storage, len(numbers))
        return SeenTensor(number, tensor.dtype, tensor.sizes, tensor.strides, tensor.offset)

    kept = [
        SeenCall(
            call.function, *(mapped(tree, SeenTensor, renumbered) for tree in (call.args, call.kwargs, call.output))
        )
        for call in calls
    ]
    output = renumbered(trace.output)
    tensors = [trace.tensors[number] for number in numbers]
    return Trace(trace.num_tokens, kept, tensors, {name: numbers[n] for name, n in trace.inputs.items()}, output)


def is_view(call: SeenCall, inputs: set[int], outputs: set[int]) -> bool:
    """Whether a call only looks at one of its arguments in another way."""
    if isinstance(call.function, Noted):
        return False
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in call.function._schema.arguments)  # type: ignore[attr-defined]
    return not writes and outputs <= inputs


def _produced(trace: Trace) -> set[int]:
    """Storages that a step makes."""
    seen: set[int] = set(trace.inputs.values())
    produced: set[int] = set()
    for call in trace.calls:
        seen.update(
            tensor.storage
            for tensor in tensors_in((call.args, call.kwargs), SeenTensor)
            if tensor.storage not in produced
        )
        produced.update(tensor.storage for tensor in tensors_in(call.output, SeenTensor) if tensor.storage not in seen)
    return produced


def tensors_in(tree: Any, kind: type[Any]) -> list[Any]:
    """All of a kind in nested lists, tuples and dicts."""
    found: list[Any] = []
    _gather(tree, kind, found)
    return found


def _gather(tree: Any, kind: type[Any], found: list[Any]) -> None:
    if isinstance(tree, kind):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _gather(item, kind, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _gather(item, kind, found)


def common_constant(tensors: list[Tensor]) -> Tensor:
    """A tensor that is the same one in every trace, or has the same numbers in each."""
    first = tensors[0]
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1:
        return first
    wholes = [torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()) for t in tensors]
    if wholes[0].numel() > MOST_CONSTANT_ELEMENTS or not all(torch.equal(wholes[0], whole) for whole in wholes):
        raise UnsupportedModelError("its code keeps something from step to step")
    return first


def common_call(calls: list[SeenCall], lengths: list[int]) -> Call:
    """A call that is the same in every trace but for sizes. Raises UnsupportedModelError."""
    function = calls[0].function
    for call in calls[1:]:
        is_same = (
            function == call.function if not isinstance(function, Attend) else _same_attention(function, call.function)
        )
        if not is_same:
            raise UnsupportedModelError("its code does not do the same in every step")
    try:
        return Call(
            function,
            *(common([getattr(call, name) for call in calls], lengths) for name in ("args", "kwargs", "output")),
        )
    except UnsupportedModelError as exc:
        raise UnsupportedModelError(f"{exc} ({function})") from None


def _same_attention(one: Attend, other: Any) -> bool:
    return isinstance(other, Attend) and one.layer == other.layer and one.params is other.params


def common(values: list[Any], lengths: list[int]) -> Any:
    """Nested values of traces of different lengths, as one: tensors are Place, ints that grow are Affine.

    Raises: UnsupportedModelError if they differ in anything else.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise UnsupportedModelError("its code does not do the same in every step")
    if isinstance(first, SeenTensor):
        if len({(value.storage, value.dtype, len(value.sizes)) for value in values}) > 1:
            raise UnsupportedModelError("its code does not do the same in every step")
        layouts = tuple((value.sizes, value.strides, value.offset) for value in values)
        return Place(first.storage, first.dtype, *_fit_layouts(layouts, tuple(lengths)))
    if isinstance(first, list | tuple):
        if len({len(value) for value in values}) > 1:
            raise UnsupportedModelError("its code does not do the same in every step")
        items = [common(list(row), lengths) for row in zip(*values, strict=True)]
        return tuple(items) if isinstance(first, tuple) else items
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise UnsupportedModelError("its code does not do the same in every step")
        return {key: common([value[key] for value in values], lengths) for key in first}
    if type(first) is int:
        found = _fit(values, lengths)
        return found if found.slope else found.base
    if any(value is not first and value != first for value in values):
        raise UnsupportedModelError("its code depends on something else than the number of tokens")
    return first


Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]
"""Sizes, strides and offset of a tensor."""


@lru_cache(maxsize=4096)  # layers are alike
def _fit_layouts(
    layouts: tuple[Layout, ...], lengths: tuple[int, ...]
) -> tuple[tuple[Affine, ...], tuple[Affine, ...], Affine]:
    sizes, strides, offsets = zip(*layouts, strict=True)
    return (
        tuple(_fit(row, lengths) for row in zip(*sizes, strict=True)),
        tuple(_fit(row, lengths) for row in zip(*strides, strict=True)),
        _fit(offsets, lengths),
    )


def _fit(values: Sequence[int], lengths: Sequence[int]) -> Affine:
    if len(set(values)) == 1:
        return Affine(values[0])
    slope, rest = divmod(values[1] - values[0], (lengths[1] - lengths[0]) or 1)
    found = Affine(values[0] - slope * lengths[0], slope)
    if rest or any(found.at(length) != value for value, length in zip(values, lengths, strict=True)):
        raise UnsupportedModelError("its code depends on the number of tokens in a way of its own")
    return found

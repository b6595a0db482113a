"""Instructions for operations on rows: along one dimension, or by index."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from shardwright.replay.affine import Affine, Place
from shardwright.replay.instructions import FLOATS, TYPES, Instruction, Operation, bits_of

ONE = Affine(1)
Lowered = list[Instruction] | None
"""Instructions for a call; None: it is left to PyTorch."""


def take_rows(out: Place, table: Place, index: Any) -> Lowered:
    """Rows of a table: out[i..., :] = table[index[i...], :]."""
    is_index = isinstance(index, Place) and index.dtype is torch.int64 and bool(table.sizes)
    if not is_index or not {table.dtype, out.dtype} <= TYPES.keys():
        return None
    return [Instruction(Operation.ROWS, (out, table, index))]


def take_rows_of_dimension(out: Place, table: Place, dim: int, index: Place) -> Lowered:
    """Rows along another dimension than the first, where those before it are of one row."""
    if any(size != ONE for size in table.sizes[:dim]):
        return None
    inner = [replace(p, sizes=p.sizes[dim:], strides=p.strides[dim:]) for p in (out, table)]
    return take_rows(inner[0], inner[1], index)


def reduce(name: str, out: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
    """A sum, mean or maximum along one dimension; arguments as ATen has them."""
    operation = {"mean": Operation.MEAN, "sum": Operation.SUM, "amax": Operation.AMAX}[name]
    value = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dims, list) or len(dims) != 1 or not are(FLOATS, out, value):
        return None
    dim = dims[0] % len(value.sizes)
    keeps = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    strides = [*out.strides[:dim], *out.strides[dim + 1 :]] if keeps else list(out.strides)
    sizes = [*value.sizes[:dim], *value.sizes[dim + 1 :]]
    target = replace(out, sizes=(*sizes, ONE), strides=(*strides, ONE))
    return [Instruction(operation, (target, with_last(value, dim)))]


def softmax(out: Place, value: Place, dim: int) -> Lowered:
    """Along one dimension."""
    if not are(FLOATS, out, value) or not value.sizes:
        return None
    dim %= len(value.sizes)
    return [Instruction(Operation.SOFTMAX, (with_last(out, dim), with_last(value, dim)))]


def normalize(
    operation: Operation,
    out: Place,
    value: Place,
    shape: list[int],
    weight: Place | None,
    bias: Place | None,
    epsilon: float | None,
) -> Lowered:
    """A norm over the last dimension."""
    given = [place for place in (out, value, weight, bias) if place is not None]
    if len(shape) != 1 or not are(FLOATS, *given) or epsilon is None:
        return None
    if any(place.strides != (ONE,) for place in (weight, bias) if place is not None):
        return None
    return [Instruction(operation, (out, value, weight, bias), (bits_of(epsilon),))]


def linear(out: Place, value: Place, packed: Place, bias: Place | None, *codes: int) -> Lowered:
    """[M, K] by a packed weight, plus [N] float32; codes have a group size and bits."""
    if not are(FLOATS, out, value):
        return None
    return [Instruction(Operation.LINEAR, (out, value, packed, bias), (0, *codes) if codes else ())]


def product(out: Place, value: Place, other: Place) -> Lowered:
    """[M, K] by [K, N]."""
    if not are(FLOATS, out, value, other):
        return None
    single = [replace(p, sizes=(ONE, *p.sizes), strides=(Affine(0), *p.strides)) for p in (out, value, other)]
    return [Instruction(Operation.PRODUCT, tuple(single))]


def as_rows(place: Place) -> Place | None:
    """A tensor as [rows, features]; None if its rows do not follow each other evenly."""
    rows, stride = ONE, Affine(0)
    for size, step in zip(place.sizes[:-1], place.strides[:-1], strict=True):
        if size == ONE:
            continue
        if rows != ONE and (size.slope or stride != step * size.base):
            return None
        rows, stride = rows * size.base if rows != ONE else size, step
    return replace(place, sizes=(rows, place.sizes[-1]), strides=(stride, place.strides[-1]))


def are(dtypes: tuple[torch.dtype, ...], *places: Any) -> bool:
    """Whether all are tensors of these types."""
    return all(isinstance(place, Place) and place.dtype in dtypes for place in places)


def with_last(place: Place, dim: int) -> Place:
    """A tensor whose dimension `dim` comes last."""
    order = [*(d for d in range(len(place.sizes)) if d != dim), dim]
    return replace(place, sizes=tuple(place.sizes[d] for d in order), strides=tuple(place.strides[d] for d in order))

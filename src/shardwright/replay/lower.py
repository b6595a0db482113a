"""From recorded PyTorch operations to instructions of our own; what has none is left to PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.replay.affine import Affine, Call, Place, Recording, tensors_in
from shardwright.replay.instructions import FLOATS, TYPES, Instruction, Operation, bits_of

ONE = Affine(1)
Lowered = list[Instruction] | None
"""Instructions for a call; None: it is left to PyTorch."""

UNARY = {
    "neg": Operation.NEG,
    "abs": Operation.ABS,
    "exp": Operation.EXP,
    "log": Operation.LOG,
    "sqrt": Operation.SQRT,
    "rsqrt": Operation.RSQRT,
    "reciprocal": Operation.RECIPROCAL,
    "sin": Operation.SIN,
    "cos": Operation.COS,
    "tanh": Operation.TANH,
    "sigmoid": Operation.SIGMOID,
    "silu": Operation.SILU,
    "relu": Operation.RELU,
    "erf": Operation.ERF,
    "clone": Operation.COPY,
    "_to_copy": Operation.COPY,
}
BINARY = {
    "add": Operation.ADD,
    "sub": Operation.SUB,
    "mul": Operation.MUL,
    "div": Operation.DIV,
    "maximum": Operation.MAXIMUM,
    "minimum": Operation.MINIMUM,
    "pow": Operation.POW,
}
FILLS = {
    "zeros": 0.0,
    "zeros_like": 0.0,
    "new_zeros": 0.0,
    "zero": 0.0,
    "ones": 1.0,
    "ones_like": 1.0,
    "new_ones": 1.0,
    "full": None,
    "full_like": None,
    "fill": None,
}
"""What a tensor is filled with; None: the second argument."""
MAKES_ROOM = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
"""Their numbers are of no meaning."""


class Lowering:
    """Turns the calls of a recording into instructions.

    Args:
        recording: what is computed; constants that the lowering needs are added to it.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._scalars: dict[float, Place] = {}

    def lower(self, call: Call) -> Lowered:
        """Instructions for a call, none if it computes nothing, None if PyTorch has to do it."""
        name = call.function._schema.name.removeprefix("aten::")
        if not tensors_in(call.output, Place):
            raise UnsupportedModelError(f"its code looks at numbers ({call.function}) while it runs")
        if _picks(call):
            raise UnsupportedModelError(f"numbers decide about shapes ({call.function})")
        if name in MAKES_ROOM:
            return []
        is_in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if is_in_place else name
        output = call.output
        if isinstance(output, tuple | list) and name != "native_layer_norm" and name != "_fused_rms_norm":
            return None
        return self._lower(name, call, output)

    def _lower(self, name: str, call: Call, out: Any) -> Lowered:
        args, kwargs = call.args, call.kwargs
        if name in UNARY:
            return self._elementwise(UNARY[name], out, args[0])
        if name == "copy":
            return self._elementwise(Operation.COPY, out, args[1])
        if name in FILLS:
            value = FILLS[name]
            return self._elementwise(Operation.COPY, out, args[1] if value is None else value)
        if name in ("clamp", "clamp_min", "clamp_max"):
            return self._clamp(name, out, args, kwargs)
        if name in BINARY and not kwargs.get("rounding_mode"):
            return self._binary(name, out, args, kwargs)
        if name == "rsub" and kwargs.get("alpha", 1) == 1 and len(args) == 2:
            return self._elementwise(Operation.SUB, out, args[1], args[0])
        if name == "gelu":
            is_tanh = kwargs.get("approximate", "none") == "tanh"
            return self._elementwise(Operation.GELU_TANH if is_tanh else Operation.GELU, out, args[0])
        if name == "where" and len(args) == 3:
            return self._elementwise(Operation.WHERE, out, *args)
        if name == "masked_fill":
            return self._elementwise(Operation.WHERE, out, args[1], args[2], args[0])
        if name == "cat":
            return self._cat(out, args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if name == "stack":
            return self._stack(out, args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if name == "embedding":
            return self._rows(out, args[0], args[1])
        if name == "index_select" and args[1] == 0:
            return self._rows(out, args[0], args[2])
        if name == "index_select":
            return self._rows_of_dimension(out, *args)
        if name == "index" and len(args[1]) == 1:
            return self._rows(out, args[0], args[1][0])
        if name in ("mean", "sum", "amax"):
            return self._reduce(name, out, args, kwargs)
        if name == "_softmax":
            return self._softmax(out, args[0], args[1])
        if name == "native_layer_norm":
            return self._normalize(Operation.LAYER_NORM, out[0], args[0], args[1], args[2], args[3], args[4])
        if name == "_fused_rms_norm":
            return self._normalize(Operation.RMS_NORM, out[0], args[0], args[1], args[2], None, args[3])
        if name == "linear":
            return self._linear_of_any_shape(out, args[0], args[1], args[2] if len(args) > 2 else None)
        if name == "mm":
            return self._linear(out, args[0], args[1], None)
        if name == "addmm" and not kwargs:
            return self._linear(out, args[1], args[2], args[0])
        if name == "bmm" and _are(FLOATS, out, *args):
            return [Instruction(Operation.PRODUCT, (out, *args))]
        return None

    def _elementwise(self, operation: Operation, out: Place, *inputs: Place | float | bool) -> Lowered:
        places = [self._place(value) for value in inputs]
        dtypes = {place.dtype for place in places}
        if operation is Operation.COPY and out.dtype not in FLOATS:
            is_plain = dtypes == {out.dtype} and out.dtype in TYPES
            return [Instruction(operation, (out, _spread(places[0], out)))] if is_plain else None
        if out.dtype not in FLOATS or not dtypes <= TYPES.keys():
            return None
        return [Instruction(operation, (out, *(_spread(place, out) for place in places)))]

    def _binary(self, name: str, out: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
        left, right = args[:2]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if alpha != 1:
            if isinstance(right, Place):
                return None
            right = right * alpha
        if name == "pow" and right == 2:
            return self._elementwise(Operation.SQUARE, out, left)
        return self._elementwise(BINARY[name], out, left, right)

    def _clamp(self, name: str, out: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
        value, *bounds = (*args, None)
        low = bounds[0] if name != "clamp_max" else None
        high = bounds[0] if name == "clamp_max" else bounds[1] if len(bounds) > 1 else None
        low, high = kwargs.get("min", low), kwargs.get("max", high)
        instructions: list[Instruction] = []
        for operation, bound in ((Operation.MAXIMUM, low), (Operation.MINIMUM, high)):
            if bound is not None:
                lowered = self._elementwise(operation, out, value, bound)
                if lowered is None:
                    return None
                instructions += lowered
                value = out
        return instructions

    def _place(self, value: Place | float | bool) -> Place:
        """A tensor as it is, and a number as a constant tensor without dimensions."""
        if isinstance(value, Place):
            return value
        number = float(value)
        if number not in self._scalars:
            self._scalars[number] = self.constant(torch.tensor(number, dtype=torch.float32))
        return self._scalars[number]

    def constant(self, tensor: Tensor) -> Place:
        """A tensor that is there before the step, as a place."""
        storage = len(self._recording.storage_bytes)
        self._recording.storage_bytes.append(Affine(tensor.untyped_storage().nbytes()))
        self._recording.constants[storage] = tensor
        sizes, strides = (tuple(map(Affine, values)) for values in (tensor.shape, tensor.stride()))
        return Place(storage, tensor.dtype, sizes, strides, Affine(int(tensor.storage_offset())))

    def _cat(self, out: Place, pieces: list[Place], dim: int) -> Lowered:
        dim %= len(out.sizes)
        instructions: list[Instruction] = []
        start = Affine(0)
        for piece in pieces:
            if len(piece.sizes) != len(out.sizes):  # empty ones may be of one dimension
                return None
            stride = out.strides[dim]
            if stride.slope and start.slope:
                return None
            sizes = (*out.sizes[:dim], piece.sizes[dim], *out.sizes[dim + 1 :])
            target = replace(out, sizes=sizes, offset=out.offset + _times(start, stride))
            copied = self._elementwise(Operation.COPY, target, piece)
            if copied is None:
                return None
            instructions += copied
            start += piece.sizes[dim]
        return instructions

    def _stack(self, out: Place, pieces: list[Place], dim: int) -> Lowered:
        dim %= len(out.sizes)
        instructions: list[Instruction] = []
        for number, piece in enumerate(pieces):
            target = replace(
                out,
                sizes=(*out.sizes[:dim], *out.sizes[dim + 1 :]),
                strides=(*out.strides[:dim], *out.strides[dim + 1 :]),
                offset=out.offset + out.strides[dim] * number,
            )
            copied = self._elementwise(Operation.COPY, target, piece)
            if copied is None:
                return None
            instructions += copied
        return instructions

    def _rows(self, out: Place, table: Place, index: Any) -> Lowered:
        is_index = isinstance(index, Place) and index.dtype is torch.int64 and bool(table.sizes)
        if not is_index or not {table.dtype, out.dtype} <= TYPES.keys():
            return None
        return [Instruction(Operation.ROWS, (out, table, index))]

    def _rows_of_dimension(self, out: Place, table: Place, dim: int, index: Place) -> Lowered:
        """Rows along another dimension than the first, where those before it are of one row."""
        if any(size != ONE for size in table.sizes[:dim]):
            return None
        inner = [replace(p, sizes=p.sizes[dim:], strides=p.strides[dim:]) for p in (out, table)]
        return self._rows(inner[0], inner[1], index)

    def _reduce(self, name: str, out: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
        operation = {"mean": Operation.MEAN, "sum": Operation.SUM, "amax": Operation.AMAX}[name]
        value = args[0]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(dims, list) or len(dims) != 1 or not _are(FLOATS, out, value):
            return None
        dim = dims[0] % len(value.sizes)
        keeps = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        strides = [*out.strides[:dim], *out.strides[dim + 1 :]] if keeps else list(out.strides)
        sizes = [*value.sizes[:dim], *value.sizes[dim + 1 :]]
        target = replace(out, sizes=(*sizes, ONE), strides=(*strides, ONE))
        return [Instruction(operation, (target, _with_last(value, dim)))]

    def _softmax(self, out: Place, value: Place, dim: int) -> Lowered:
        if not _are(FLOATS, out, value) or not value.sizes:
            return None
        dim %= len(value.sizes)
        return [Instruction(Operation.SOFTMAX, (_with_last(out, dim), _with_last(value, dim)))]

    def _normalize(
        self,
        operation: Operation,
        out: Place,
        value: Place,
        shape: list[int],
        weight: Place | None,
        bias: Place | None,
        epsilon: float | None,
    ) -> Lowered:
        given = [place for place in (out, value, weight, bias) if place is not None]
        if len(shape) != 1 or not _are(FLOATS, *given) or epsilon is None:
            return None
        if any(place.strides != (ONE,) for place in (weight, bias) if place is not None):
            return None
        return [Instruction(operation, (out, value, weight, bias), (bits_of(epsilon),))]

    def _linear_of_any_shape(self, out: Place, value: Place, weight: Place, bias: Place | None) -> Lowered:
        """[..., K] by [N, K], where the leading dimensions are those of one list of rows."""
        transposed = replace(weight, sizes=weight.sizes[::-1], strides=weight.strides[::-1])
        rows = [_as_rows(place) for place in (out, value)]
        if rows[0] is None or rows[1] is None or len(weight.sizes) != 2:
            return None
        return self._linear(rows[0], rows[1], transposed, bias)

    def _linear(self, out: Place, value: Place, weight: Place, bias: Place | None) -> Lowered:
        given = [place for place in (out, value, weight, bias) if place is not None]
        is_vector = bias is None or (len(bias.sizes) == 1 and bias.strides == (ONE,) and bias.sizes == out.sizes[1:])
        if not _are(FLOATS, *given) or not is_vector:
            return None
        if weight.storage in self._recording.constants:
            rows, columns = weight.sizes
            if weight.strides == (ONE, rows):
                return [Instruction(Operation.LINEAR, (out, value, weight, bias))]
            if weight.strides == (columns, ONE):
                return [Instruction(Operation.LINEAR_TRANSPOSED, (out, value, weight, bias))]
        if bias is not None:
            return None
        single = [replace(p, sizes=(ONE, *p.sizes), strides=(Affine(0), *p.strides)) for p in (out, value, weight)]
        return [Instruction(Operation.PRODUCT, tuple(single))]


def _picks(call: Call) -> bool:
    """Whether the numbers in a tensor decide how large a call's output is."""
    if call.function._schema.name == "aten::index":  # it does so only for places at which a tensor is true
        return any(place.dtype is torch.bool for place in tensors_in(call.args[1], Place))
    return torch.Tag.dynamic_output_shape in call.function.tags


def _as_rows(place: Place) -> Place | None:
    """A tensor as [rows, features]; None if its rows do not follow each other evenly."""
    rows, stride = ONE, Affine(0)
    for size, step in zip(place.sizes[:-1], place.strides[:-1], strict=True):
        if size == ONE:
            continue
        if rows != ONE and (size.slope or stride != step * size.base):
            return None
        rows, stride = rows * size.base if rows != ONE else size, step
    return replace(place, sizes=(rows, place.sizes[-1]), strides=(stride, place.strides[-1]))


def _are(dtypes: tuple[torch.dtype, ...], *places: Any) -> bool:
    return all(isinstance(place, Place) and place.dtype in dtypes for place in places)


def _times(one: Affine, other: Affine) -> Affine:
    """The product, where one of both does not depend on the number of tokens."""
    return one * other.base if not other.slope else other * one.base


def _spread(place: Place, out: Place) -> Place:
    """A tensor broadcast to the shape of another: it steps by 0 where it is repeated."""
    missing = len(out.sizes) - len(place.sizes)
    strides = [Affine(0)] * missing
    for size, stride, wanted in zip(place.sizes, place.strides, out.sizes[missing:], strict=True):
        strides.append(Affine(0) if size == ONE and wanted != ONE else stride)
    return replace(place, sizes=out.sizes, strides=tuple(strides))


def _with_last(place: Place, dim: int) -> Place:
    """A tensor whose dimension `dim` comes last."""
    order = [*(d for d in range(len(place.sizes)) if d != dim), dim]
    return replace(place, sizes=tuple(place.sizes[d] for d in order), strides=tuple(place.strides[d] for d in order))

"""From recorded PyTorch operations to instructions of our own; what has none is left to PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.kernels.packed_linear import pack_weight
from shardwright.replay.affine import Affine, Call, Place, Recording, tensors_in
from shardwright.replay.fold import constant_tensor
from shardwright.replay.instructions import FLOATS, TYPES, Instruction, Operation
from shardwright.replay.lower_rows import (
    ONE,
    Lowered,
    are,
    as_rows,
    linear,
    normalize,
    product,
    reduce,
    softmax,
    take_rows,
    take_rows_of_dimension,
)

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
        self._packed_weights: dict[Place, Place] = {}

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
            return take_rows(out, args[0], args[1])
        if name == "index_select" and args[1] == 0:
            return take_rows(out, args[0], args[2])
        if name == "index_select":
            return take_rows_of_dimension(out, *args)
        if name == "index" and len(args[1]) == 1:
            return take_rows(out, args[0], args[1][0])
        if name in ("mean", "sum", "amax"):
            return reduce(name, out, args, kwargs)
        if name == "_softmax":
            return softmax(out, args[0], args[1])
        if name == "native_layer_norm":
            return normalize(Operation.LAYER_NORM, out[0], args[0], args[1], args[2], args[3], args[4])
        if name == "_fused_rms_norm":
            return normalize(Operation.RMS_NORM, out[0], args[0], args[1], args[2], None, args[3])
        if name == "linear":
            return self._linear(out, args[0], args[1], args[2] if len(args) > 2 else None)
        if name == "shardwright::packed_linear":
            return linear(out, *args[:3])
        if name == "shardwright::coded_linear":
            return linear(out, *args[:3], *args[4:])
        if name == "mm":
            return self._linear(out, args[0], _turned(args[1]), None)
        if name == "addmm" and not kwargs:
            return self._linear(out, args[1], _turned(args[2]), args[0])
        if name == "bmm" and are(FLOATS, out, *args):
            return [Instruction(Operation.PRODUCT, (out, *args))]
        return None

    def _linear(self, out: Place, value: Place, weight: Place, bias: Place | None) -> Lowered:
        """[..., K] by a weight [N, K], plus [N], where the leading dimensions are those of one list of rows."""
        rows = [as_rows(place) for place in (out, value)]
        if rows[0] is None or rows[1] is None or len(weight.sizes) != 2 or not are(FLOATS, *rows, weight):
            return None
        if weight.storage not in self._recording.constants:
            return None if bias is not None else product(rows[0], rows[1], _turned(weight))
        if bias is None:
            return linear(rows[0], rows[1], self._packed(weight), None)
        if bias.storage not in self._recording.constants or bias.sizes != weight.sizes[:1]:
            return None
        wide = self.constant(constant_tensor(bias, self._recording).float().contiguous())
        return linear(rows[0], rows[1], self._packed(weight), wide)

    def _packed(self, weight: Place) -> Place:
        if weight not in self._packed_weights:
            self._packed_weights[weight] = self.constant(pack_weight(constant_tensor(weight, self._recording)))
        return self._packed_weights[weight]

    def weights(self) -> dict[int, Tensor]:
        """The weights that were packed, by the address of the packed one."""
        constants = self._recording.constants
        return {
            constants[packed.storage].data_ptr(): constant_tensor(weight, self._recording)
            for weight, packed in self._packed_weights.items()
        }

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


def _picks(call: Call) -> bool:
    """Whether the numbers in a tensor decide how large a call's output is."""
    if call.function._schema.name == "aten::index":  # it does so only for places at which a tensor is true
        return any(place.dtype is torch.bool for place in tensors_in(call.args[1], Place))
    return torch.Tag.dynamic_output_shape in call.function.tags


def _turned(place: Place) -> Place:
    """A matrix with its dimensions exchanged."""
    return replace(place, sizes=place.sizes[::-1], strides=place.strides[::-1])


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

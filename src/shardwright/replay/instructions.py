"""The list that kernels/native/replay.cpp carries out, as numbers.

An instruction is a row of int64: an operation, values of its own, and up to four tensors (the output first), each with
its address, type, sizes and strides. Every number is a function of the number of tokens, so the list for T tokens is
`base + T * slope`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np
import numpy.typing as npt
import torch

from shardwright.errors import UnsupportedModelError
from shardwright.replay.affine import Affine, Place

MOST_DIMS, MOST_TENSORS, MOST_VALUES = 6, 4, 12
"""As in native/instructions.h."""
TENSOR_WIDTH = 3 + 2 * MOST_DIMS
WIDTH = 1 + MOST_VALUES + MOST_TENSORS * TENSOR_WIDTH

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2, torch.bool: 3, torch.int32: 4, torch.uint8: 5}
FLOATS = (torch.float32, torch.bfloat16)


class Operation(IntEnum):
    """What native/replay.cpp can do, numbered as in native/operations.h."""

    HOST = 0
    COPY = auto()
    NEG = auto()
    ABS = auto()
    EXP = auto()
    LOG = auto()
    SQRT = auto()
    RSQRT = auto()
    RECIPROCAL = auto()
    SIN = auto()
    COS = auto()
    TANH = auto()
    SIGMOID = auto()
    SILU = auto()
    GELU = auto()
    GELU_TANH = auto()
    RELU = auto()
    ERF = auto()
    SQUARE = auto()
    ADD = auto()
    SUB = auto()
    MUL = auto()
    DIV = auto()
    MAXIMUM = auto()
    MINIMUM = auto()
    POW = auto()
    WHERE = auto()
    SUM = auto()
    MEAN = auto()
    AMAX = auto()
    SOFTMAX = auto()
    LAYER_NORM = auto()
    RMS_NORM = auto()
    ROWS = auto()
    LINEAR = auto()
    PRODUCT = auto()
    WRITE_CACHE = auto()
    ATTENTION = auto()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation on tensors."""

    operation: Operation
    tensors: tuple[Place | None, ...] = ()
    """The output first; None: it is not given."""
    values: tuple[int, ...] = ()


def bits_of(value: float) -> int:
    """A float32 as the low half of an int64."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def encode(
    instructions: Sequence[Instruction], addresses: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Base and slope of a list.

    Args:
        instructions: in order.
        addresses: where each storage begins, by its number.

    Returns: both [number of instructions, WIDTH].
    """
    base = np.zeros((len(instructions), WIDTH), dtype=np.int64)
    slope = np.zeros_like(base)
    for row, instruction in enumerate(instructions):
        base[row, 0] = instruction.operation
        base[row, 1 : 1 + len(instruction.values)] = instruction.values
        for number, place in enumerate(instruction.tensors):
            if place is not None:
                start = 1 + MOST_VALUES + number * TENSOR_WIDTH
                fields = _fields(place, addresses[place.storage])
                base[row, start : start + TENSOR_WIDTH] = [field.base for field in fields]
                slope[row, start : start + TENSOR_WIDTH] = [field.slope for field in fields]
    return base, slope


def fields_of_tensors(instruction: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The tensors of an encoded instruction: [MOST_TENSORS, TENSOR_WIDTH], a view."""
    return instruction[1 + MOST_VALUES :].reshape(MOST_TENSORS, TENSOR_WIDTH)


def _fields(place: Place, address: int) -> list[Affine]:
    dims = len(place.sizes)
    if dims > MOST_DIMS:
        raise UnsupportedModelError(f"a tensor of {dims} dimensions")
    padding = [Affine(0)] * (MOST_DIMS - dims)
    data = place.offset * place.dtype.itemsize + Affine(address)
    return [
        data,
        Affine(TYPES[place.dtype]),
        Affine(dims),
        *place.sizes,
        *padding,
        *place.strides,
        *padding,
    ]

"""What a recorded step does in one go: products that are carried out as one, and runs of operations that are one pass.

For people to read. What a run is called says what operations it has, in their order; they are carried out as recorded,
whatever it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shardwright.replay.instructions import MOST_DIMS, MOST_VALUES, Operation, fields_of_tensors
from shardwright.replay.program import Program

Ints = npt.NDArray[np.int64]

NUM_TOKENS = 2
"""Of the step that is looked at: more than one, so that what is the same for all tokens is told from what is not."""
_ACTIVATIONS = {
    Operation.SILU, Operation.GELU, Operation.GELU_TANH, Operation.SIGMOID, Operation.RELU, Operation.TANH,
    Operation.ERF,
}  # fmt: skip
_ACTIVATION_NAMES = {operation.name.lower() for operation in _ACTIVATIONS}
_REDUCTIONS = {Operation.SUM, Operation.MEAN}
_ROOTS = {Operation.SQRT, Operation.RSQRT}
_SIZES, _STRIDES = slice(3, 3 + MOST_DIMS), slice(3 + MOST_DIMS, 3 + 2 * MOST_DIMS)
"""Of a tensor's fields."""


@dataclass(frozen=True, slots=True)
class Cost:
    """How much there is to do."""

    operations: int
    """That the code asks for."""
    passes: int
    """That they are carried out in."""


@dataclass(frozen=True, slots=True)
class Run:
    """Operations that are carried out in one pass."""

    what: str
    operations: int


@dataclass(frozen=True, slots=True)
class Passes:
    """One step."""

    step: Cost
    layer: Cost | None
    """From one attention to the next, in the middle one of all layers; None if there is one attention at most."""
    products: list[list[Tensor]]
    """Weights of products that are one."""
    runs: list[Run]
    by_torch: int
    """Operations that are left to PyTorch."""


def passes_of(program: Program) -> Passes:
    """What is carried out together in a program's steps."""
    listed = program.listed(NUM_TOKENS)
    begins = _begins(listed)
    attends = np.flatnonzero(listed[:, 0] == Operation.ATTENTION).tolist()
    layers = [Cost(end - start, int(begins[start + 1 : end + 1].sum())) for start, end in pairwise(attends)]
    starts = np.flatnonzero(begins).tolist()
    groups = [listed[start:end] for start, end in pairwise([*starts, len(listed)])]
    products = [_weights(group, program) for group in groups if len(group) > 1 and group[0, 0] == Operation.LINEAR]
    runs = [Run(_name(group), len(group)) for group in groups if len(group) > 1 and group[0, 0] != Operation.LINEAR]
    return Passes(
        Cost(len(listed), len(groups)),
        sorted(layers, key=lambda cost: cost.passes)[len(layers) // 2] if layers else None,
        products,
        runs,
        program.num_host_calls,
    )


def _begins(listed: Ints) -> npt.NDArray[np.bool_]:
    """[number of instructions]: whether one is not carried out together with the one before."""
    begins = np.ones(len(listed), dtype=np.bool_)
    place = 0
    while place < len(listed):
        operation, values = listed[place, 0], listed[place, 1 : 1 + MOST_VALUES]
        count = 1
        if Operation.COPY <= operation <= Operation.AMAX:
            count = max(int(values[-1]), 1)
            begins[place + 1 : place + count] = False
        elif operation == Operation.LINEAR:
            begins[place] = not values[0]
        place += count
    return begins


def _weights(group: Ints, program: Program) -> list[Tensor]:
    addresses = [int(fields_of_tensors(instruction)[2, 0]) for instruction in group]
    return [program.weights[address] for address in addresses if address in program.weights]


def _name(group: Ints) -> str:
    """The steps of a run that have a name, in their order."""
    names: list[str] = []
    is_reduced = False
    for instruction in group:
        operation = Operation(int(instruction[0]))
        if operation in _REDUCTIONS:
            is_reduced = True
        elif operation in _ROOTS and is_reduced:
            names.append("norm")
            is_reduced = False
        elif operation in (Operation.COS, Operation.SIN):
            names.append("cos, sin")
        elif operation is Operation.NEG:
            names.append("rotary")
        elif operation in _ACTIVATIONS:
            names.append(operation.name.lower())
        elif operation is Operation.ADD and "rotary" not in names and _is_of_two_rows(instruction):
            names.append("residual")
        elif operation is Operation.MUL and names and names[-1] in _ACTIVATION_NAMES and _is_of_two_rows(instruction):
            names.append("gate")
    return " + ".join(name for name, _ in groupby(names)) or "elementwise"


def _is_of_two_rows(instruction: Ints) -> bool:
    """Whether both inputs are rows of their own for every row of the output: neither a weight nor a number."""
    _, left, right, _ = fields_of_tensors(instruction)
    dims = int(left[2])
    return all(((tensor[_SIZES][:dims] == 1) | (tensor[_STRIDES][:dims] != 0)).all() for tensor in (left, right))

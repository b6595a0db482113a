"""Runs of operations (replay/fuse.py) as functions of their own, compiled by the system's C++ compiler.

What is a number here, the length of a row or where it is kept, is one for the compiler too: it unrolls loops and keeps
numbers in registers, where native/runs.h goes through memory from one operation to the next. Both compute the same, bit
by bit. Layers that are alike share their functions. Compiling takes a second on an idle machine, once for a model: it
is done in the background, and steps that come before are carried out operation by operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from threading import Thread

import torch

from shardwright.kernels.background import give_way
from shardwright.kernels.jit import generated_library
from shardwright.replay.affine import Place
from shardwright.replay.fuse import IN_MEMORY, REDUCTIONS, is_of_run
from shardwright.replay.instructions import MOST_TENSORS, MOST_VALUES, Instruction

FUNCTION = 1 + MOST_VALUES - 3
"""Column of an encoded run's first instruction that has its function's address."""
MOST_OPERANDS = 48
"""As in native/operations.h, which the compiler makes sure of."""
MOST_KEPT = 1 << 15
"""Numbers that a function has on its stack; rows that are longer gain little."""
WORTH_COMPILING = 1 << 16
"""Numbers that runs make in a step of one token: with fewer, other things take longer."""

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
}


class CompiledRuns:
    """The functions of a list's runs, which are there when they are compiled.

    Args:
        instructions: of a step, runs marked.
    """

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._instructions = instructions
        self._names: dict[int, str] = {}
        """By the number of a run's first instruction."""
        self.source = ""
        self._library: ctypes.CDLL | None = None
        self._thread: Thread | None = None

    def begin(self) -> None:
        """Have them written and compiled, in the background, if runs are enough of a step."""
        if not _are_worth_compiling(self._instructions):
            return
        # A daemon holds no tensors, and may be ended anywhere
        self._thread = Thread(target=self._compile, name="compile-runs", daemon=True)
        self._thread.start()

    def take(self, *, waits: bool = False) -> dict[int, int]:
        """Addresses of functions, by the number of a run's first instruction; told once, when all are there.

        Args:
            waits: whether to wait until they are.
        """
        if self._thread is None or (self._thread.is_alive() and not waits):
            return {}
        self._thread.join()
        self._thread = None
        library = self._library
        if library is None:
            return {}
        addresses = {name: ctypes.cast(library[name], ctypes.c_void_p).value or 0 for name in self._names.values()}
        return {row: addresses[name] for row, name in self._names.items()}

    def _compile(self) -> None:
        give_way()
        bodies: dict[str, str] = {}
        for row, run in _runs(self._instructions):
            if (body := _body(run)) is not None:
                self._names[row] = bodies.setdefault(body, f"run_{len(bodies)}")
        if bodies:
            functions = (_function(name, body) for body, name in bodies.items())
            self.source = "\n".join(['#include "compiled_run.h"', "using namespace shardwright;", *functions])
            self._library = generated_library("runs", self.source)


def _are_worth_compiling(instructions: Sequence[Instruction]) -> bool:
    """Whether runs are enough of a step."""
    made = (instruction.tensors[0] for _, run in _runs(instructions) for instruction in run)
    return sum(prod(size.at(1) for size in place.sizes) for place in made if place is not None) >= WORTH_COMPILING


def _runs(instructions: Sequence[Instruction]) -> Iterator[tuple[int, Sequence[Instruction]]]:
    """The number of each run's first instruction, and the run."""
    for row, instruction in enumerate(instructions):
        if is_of_run(instruction) and (count := instruction.values[-1]):
            yield row, instructions[row : row + count]


def _function(name: str, body: str) -> str:
    return (
        f"EXPORTED void {name}(char* const* places, const int64_t* steps, int64_t rows) {{\n"
        f"    for (int64_t row = 0; row < rows; ++row) {{\n{body}\n    }}\n}}"
    )


@dataclass(slots=True)
class _Operands:
    """Counts tensors in memory."""

    count: int = 0

    def next(self) -> int:
        self.count += 1
        return self.count - 1


def _body(run: Sequence[Instruction]) -> str | None:
    """What is done with one row; None if a size hangs on the number of tokens, or if it is too much for a function."""
    if run[0].values[-2] > MOST_KEPT:
        return None
    operands = _Operands()
    lines = ["const Row in{places, steps, row};", f"alignas(LINE) float kept[{run[0].values[-2]}];"]
    for instruction in run:
        places = [place for place in instruction.tensors if place is not None]
        if any(place.strides[-1].slope or place.sizes[-1].slope for place in places):
            return None
        lines += _lines(instruction, places, operands)
    if operands.count > MOST_OPERANDS:
        return None
    lines.append(f"static_assert({operands.count} <= MOST_OPERANDS);")
    return "\n".join(f"        {line}" for line in lines)


def _lines(instruction: Instruction, places: Sequence[Place], operands: _Operands) -> list[str]:
    """One operation, and what it writes to memory."""
    operation, (output, *inputs) = instruction.operation, places
    target, *sources = instruction.values[: len(places)]
    length = inputs[0].sizes[-1].base
    made = 1 if operation in REDUCTIONS else length
    rounds = "false"
    if output.dtype is torch.bfloat16:
        is_all_half = all(place.dtype is torch.bfloat16 for place in inputs)
        rounds = f"!is_exact({operation.name})" if is_all_half else "true"
    given, is_aside = [], False
    for place, source in zip(inputs, sources, strict=True):
        step = place.strides[-1].base
        if source == IN_MEMORY:
            given.append(f"in.numbers<{_TYPES[place.dtype]}, {step}>({operands.next()})")
        else:
            given.append(f"Numbers<float, {step}>{{kept + {source}}}")
            overlaps = source < target + made and target < source + (length if step else 1)
            is_aside |= overlaps and (source != target or step == 0)
    call = "reduce" if operation in REDUCTIONS else "each_aside" if is_aside else "each"
    arguments = ", ".join([f"kept + {target}", *given])
    lines = [f"{call}<{operation.name}, {length}, {rounds}>({arguments});"]
    if instruction.values[MOST_TENSORS]:
        start = f"in.start<{_TYPES[output.dtype]}>({operands.next()})"
        lines.append(f"write<{made}, {output.strides[-1].base}>(kept + {target}, {start});")
    return lines

"""Carry out runs of elementwise operations row by row: what one makes, the next finds in the CPU's nearest cache.

A norm, a rotary embedding, a gated activation are such runs, however the code spells them. All operations of a run have
the same rows: one for each place of all dimensions but the last. Rows of what the run makes are kept as float32
numbers, rounded as tensors of their type would be, and only what others need is written to memory. Nothing is
reordered, and nothing is computed in another way than one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shardwright.replay.affine import Affine, Place
from shardwright.replay.instructions import FLOATS, MOST_TENSORS, MOST_VALUES, Instruction, Operation

MOST_FEATURES = 16_384
"""Of a row: longer ones are better cut among threads."""
MOST_NUMBERS = 1 << 17
"""Of all rows that a run keeps at a time."""

ALIGNMENT = 16
"""Numbers: rows that a run keeps begin where vectors of the machine do, or each would be read in two pieces."""

IN_MEMORY = -1
_ONE = Affine(1)
REDUCTIONS = (Operation.SUM, Operation.MEAN, Operation.AMAX)
_FUSIBLE = frozenset(range(Operation.COPY, Operation.WHERE + 1)) | set(REDUCTIONS)


def fused(instructions: Sequence[Instruction], needed: Sequence[frozenset[int]]) -> list[Instruction]:
    """The same instructions, runs of them marked as such.

    Args:
        instructions: of a step.
        needed: for each, storages that later ones use, or the step's end.

    Returns: as many. Of those in a run, values tell where the rows of tensors are kept (IN_MEMORY if not) and whether
        the output is written to memory as well; the first one's last two, how many numbers are kept and how many
        instructions there are in the run.
    """
    result: list[Instruction] = []
    run = _Run()
    for place, instruction in enumerate(instructions):
        if not run.takes(instruction):
            result += run.finished(needed[place - 1] if place else frozenset())
            run = _Run()
            if not run.takes(instruction):
                result.append(instruction)
    return result + run.finished(needed[-1] if instructions else frozenset())


def needed_after(uses: Sequence[frozenset[int]], output: int) -> list[frozenset[int]]:
    """For each instruction, storages that those after it use, or the step's end."""
    needed = [frozenset({output})]
    for used in reversed(uses[1:]):
        needed.append(needed[-1] | used)
    return needed[::-1]


def used_at_once(instructions: Sequence[Instruction], uses: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """What each instruction uses, where those of a run use all that the run does: its rows are at different places."""
    result = list(uses)
    for place, instruction in enumerate(instructions):
        count = instruction.values[-1] if is_of_run(instruction) else 0
        result[place : place + count] = [frozenset().union(*uses[place : place + count])] * count
    return result


def is_of_run(instruction: Instruction) -> bool:
    """Whether it is part of a run; the last value of a run's first one is the number of its instructions."""
    return instruction.operation in _FUSIBLE and bool(instruction.values)


@dataclass(slots=True)
class _Rows:
    """Rows of one storage that a run makes."""

    strides: tuple[Affine, ...]
    """From row to row."""
    base: Affine
    """Where the first row begins, in elements."""
    parts: list[tuple[int, int]] = field(default_factory=list)
    """Pieces of a row that were made: from where to where, counted from the base."""

    def piece(self, place: Place) -> tuple[int, int] | None:
        """Which piece of the rows a tensor is; None if it is none."""
        start, step = place.offset + self.base * -1, place.strides[-1]
        is_one = step == Affine(0) or place.sizes[-1] == _ONE
        if place.strides[:-1] != self.strides or start.slope or not (is_one or step == _ONE):
            return None
        return start.base, start.base + (1 if is_one else place.sizes[-1].base)

    @property
    def span(self) -> tuple[int, int]:
        return min(start for start, _ in self.parts), max(end for _, end in self.parts)

    def are_apart(self, outer: tuple[Affine, ...], start: int, end: int) -> bool:
        """Whether no row reaches into another one, with a piece more."""
        low, high = min(start, *(s for s, _ in self.parts), start), max(end, *(e for _, e in self.parts), end)
        steps = [stride.at(1) for size, stride in zip(outer, self.strides, strict=True) if size != _ONE]
        return all(step >= high - low for step in steps)


class _Run:
    """Instructions that follow each other and have the same rows."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._outer: tuple[Affine, ...] = ()
        self._made: dict[int, _Rows] = {}
        self._read: list[Place] = []
        """From memory."""

    def takes(self, instruction: Instruction) -> bool:
        """Take the next instruction in, if it can be part of this run."""
        squeezed = _squeezed(instruction)
        if squeezed is None:
            return False
        output, *inputs = (place for place in squeezed.tensors if place is not None)
        outer = output.sizes[:-1]
        if self._instructions and outer != self._outer:
            return False
        from_memory = []
        for place in inputs:
            rows = self._made.get(place.storage)
            piece = None if rows is None else rows.piece(place)
            if rows is None:
                from_memory.append(place)
            elif piece is None or not _is_covered(piece, rows.parts):
                return False
        rows = self._made.get(output.storage) or _Rows(output.strides[:-1], output.offset)
        made = rows.piece(output)
        if made is None or not rows.are_apart(outer, *made):
            return False
        if any(place.storage == output.storage and not _same_rows(place, output) for place in self._read + from_memory):
            return False  # a row would be changed that another one still has to read
        rows.parts.append(made)
        self._made[output.storage] = rows
        self._read += from_memory
        self._outer = outer
        self._instructions.append(squeezed)
        return True

    def finished(self, needed: frozenset[int]) -> list[Instruction]:
        """The run's instructions as the machine takes them; `needed` are storages that others use."""
        if len(self._instructions) < 2:
            return self._instructions
        starts, total = {}, 0
        for storage, rows in self._made.items():
            low, high = rows.span
            starts[storage] = total - low
            total += -(-(high - low) // ALIGNMENT) * ALIGNMENT
        if total > MOST_NUMBERS:
            return self._instructions
        result = []
        seen: Counter[int] = Counter()
        for instruction in self._instructions:
            kept = [IN_MEMORY] * MOST_TENSORS
            for number, place in enumerate(instruction.tensors):
                if place is not None and (number == 0 or seen[place.storage]):
                    piece = self._made[place.storage].piece(place)
                    assert piece is not None
                    kept[number] = starts[place.storage] + piece[0]
            output = instruction.tensors[0]
            assert output is not None
            seen[output.storage] += 1
            values = [*kept, int(output.storage in needed)]
            result.append(replace(instruction, values=(*values, *[0] * (MOST_VALUES - len(values)))))
        result[0] = replace(result[0], values=(*result[0].values[:-2], total, len(result)))
        return result


def _squeezed(instruction: Instruction) -> Instruction | None:
    """An instruction without dimensions of one element, but for the last; None if it cannot be part of a run."""
    if instruction.operation not in _FUSIBLE:
        return None
    output, *inputs = places = [place for place in instruction.tensors if place is not None]
    if not output.sizes or output.dtype not in FLOATS or any(len(p.sizes) != len(output.sizes) for p in inputs):
        return None
    widest = inputs[0] if instruction.operation in REDUCTIONS else output
    length = widest.sizes[-1]
    if length.slope or length.base > MOST_FEATURES or (output.strides[-1] != _ONE and output.sizes[-1] != _ONE):
        return None
    kept = [dim for dim, size in enumerate(widest.sizes[:-1]) if size != _ONE]
    return replace(instruction, tensors=tuple(_with_dims(place, kept) for place in places))


def _with_dims(place: Place, kept: Iterable[int]) -> Place:
    kept = [*kept, len(place.sizes) - 1]
    return replace(
        place, sizes=tuple(place.sizes[dim] for dim in kept), strides=tuple(place.strides[dim] for dim in kept)
    )


def _is_covered(piece: tuple[int, int], parts: Sequence[tuple[int, int]]) -> bool:
    """Whether all of a piece of a row was made."""
    start, end = piece
    for low, high in sorted(parts):
        if low <= start < high:
            start = high
    return start >= end


def _same_rows(one: Place, other: Place) -> bool:
    """Whether both are rows of a storage in the same places."""
    return (one.strides, one.offset, one.sizes) == (other.strides, other.offset, other.sizes)

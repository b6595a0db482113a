"""What is known on the way through a trace: labels, products that close, and what came to light about parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardwright.plans.flow.atoms import Atoms, Labels, distinct
from shardwright.plans.flow.memory import Memory, Origin, Root, thin
from shardwright.plans.flow.record import Ref, Trace

Fixed = dict[tuple[str, int], Labels]
"""Parameter and dimension to one flag for each index: true if every rank has it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of one parameter, and its atoms."""

    name: str
    dim: int
    atoms: Labels


@dataclass(frozen=True, slots=True)
class Closing:
    """A product that sums over what ranks hold parts of: each has a partial sum, to be added up when a module ends."""

    call: int
    """The module call at whose end the sum is due."""
    labels: Labels
    origin: Origin | None
    """The rows of the weight."""


class Flow:
    """The state of one way through a trace.

    Args:
        trace: of a forward pass.
        fixed: what every rank is to have from the start.
    """

    def __init__(self, trace: Trace, fixed: Fixed) -> None:
        self.trace = trace
        self.atoms = Atoms()
        self.memory = Memory(self.atoms)
        self.axes: list[Axis] = []
        self.closings: list[Closing] = []
        self.cut: set[Origin] = set(fixed)
        """Columns that were cut, in this pass or one before."""
        self.sums: set[str] = set()
        """Modules at whose end partial sums are added up."""
        self.once: set[str] = set()
        """Biases that are added to a partial sum, which one rank may do."""
        self.tokens: set[int] = set()
        """Storages that hold token numbers."""
        self.tables: set[str] = set()
        """Parameters that tokens are looked up in."""
        self.stacked: set[str] = set()
        """Parameters whose first dimension chooses among matrices."""
        self.heads: list[Labels] = []
        """Atoms that two activations were multiplied by."""
        self.splits: list[Labels] = []
        """Dimensions that code divides in several: their atoms, one dimension for each part."""
        self.unknown: set[str] = set()
        """Operations without a rule."""
        for name, ref in trace.refs.items():
            self._plant(name, ref, fixed)

    def _plant(self, name: str, ref: Ref, fixed: Fixed) -> None:
        candidates, origins = [], []
        for dim, size in enumerate(ref.size):
            if size < 2:
                continue
            axis = Axis(name, dim, self.atoms.new(size))
            self.axes.append(axis)
            if (flags := fixed.get((name, dim))) is not None:
                self.atoms.bind(axis.atoms[flags], np.zeros(1, dtype=np.int64))
            origins.append((name, dim))
            candidates.append(axis.atoms.reshape([size if other == dim else 1 for other in range(len(ref.size))]))
        self.memory.roots[ref.storage] = Root(ref, tuple(candidates), tuple(origins))

    def fixed(self) -> Fixed:
        """Of what was cut, what every rank turned out to have."""
        axes = [axis for axis in self.axes if (axis.name, axis.dim) in self.cut]
        flags = {(axis.name, axis.dim): self.atoms.find(axis.atoms) == 0 for axis in axes}
        return {key: value for key, value in flags.items() if value.any()}

    def whole(self, labels: Labels | None) -> None:
        """Have every rank hold this."""
        if labels is None:
            return
        labels = thin(labels)
        if (labels < 0).any():
            self.spoil(labels)
        positive = labels[labels > 0]
        if positive.size:
            self.atoms.bind(positive, np.zeros(1, dtype=np.int64))

    def spoil(self, labels: Labels) -> None:
        """Give up the products whose partial sums are among these: something not linear was done to them."""
        calls = {-int(label) - 1 for label in distinct(labels[labels < 0])}
        for closing in self.closings:
            if closing.call in calls:
                self.atoms.bind(closing.labels, np.zeros(1, dtype=np.int64))

    def merge(self, labels: Labels | None, axes: Sequence[int]) -> Labels | None:
        """Bind all that differ along some axes. Returns labels of size 1 along these."""
        if labels is None:
            return None
        labels = thin(labels)
        if (labels < 0).any():
            self.spoil(labels)
            labels = np.maximum(labels, 0)
        axes = [axis for axis in axes if labels.shape[axis] > 1]
        if not axes:
            return self.atoms.find(labels)
        kept = [size for axis, size in enumerate(labels.shape) if axis not in axes]
        shape = [1 if axis in axes else size for axis, size in enumerate(labels.shape)]
        moved = np.moveaxis(labels, axes, range(-len(axes), 0)).reshape(int(np.prod(kept)), -1)
        rows, place = np.unique(moved, axis=0, return_inverse=True)
        return self.atoms.find(self._merge_rows(self.atoms.find(rows))[place.ravel()].reshape(shape))

    def _merge_rows(self, rows: Labels) -> Labels:
        """Bind what differs in each row, but what several rows have, as keys of several heads may, is only needed."""
        number, column = np.nonzero(rows)
        pairs = np.unique(np.stack([number, rows[number, column]]), axis=1)
        own = ~_repeated(pairs[1])
        first = np.zeros(len(rows), dtype=np.int64)
        np.maximum.at(first, pairs[0, own], pairs[1, own])
        has_own = first[pairs[0]] > 0
        self.atoms.need(first[pairs[0, has_own & ~own]], pairs[1, has_own & ~own])
        np.maximum.at(first, pairs[0, ~has_own], pairs[1, ~has_own])
        bound = own | ~has_own
        self.atoms.bind(first[pairs[0, bound]], pairs[1, bound])
        return first

    def combine(self, operands: Sequence[Operand], rank: int) -> Labels | None:
        """Labels of elements that are computed from those of several tensors at their places.

        A dimension that one of them has whole cannot be cut in the others. What is used with several others is needed
        by each of these; several with several are bound.

        Args:
            operands: of the operation.
            rank: dimensions of its result.
        """
        sides = [side.aligned(rank) for side in operands]
        labelled = [i for i, side in enumerate(sides) if side.labels is not None]
        for axis in range(rank):
            cut = [i for i in labelled if _varies(sides[i].labels, axis)]
            if cut and any(side.full[axis] and i not in cut for i, side in enumerate(sides)):
                for i in cut:
                    sides[i] = Operand(self.merge(sides[i].labels, [axis]), sides[i].full)
        result: Labels | None = None
        for i in labelled:
            result = self._pair(result, sides[i].labels)
        return result

    def _pair(self, left: Labels | None, right: Labels | None) -> Labels | None:
        if left is None or right is None:
            return right if left is None else left
        left, right = np.broadcast_arrays(self.atoms.find(thin(left)), self.atoms.find(thin(right)))
        differ = (left != right) & (left > 0) & (right > 0)
        result = np.where(left > 0, left, right)
        if differ.any():
            pairs, place = np.unique(np.stack([left[differ], right[differ]]), axis=1, return_inverse=True)
            shared_left, shared_right = _repeated(pairs[0]), _repeated(pairs[1])
            self.atoms.need(*pairs[:, shared_right & ~shared_left])
            self.atoms.need(*pairs[::-1, shared_left & ~shared_right])
            bound = shared_left == shared_right
            result[differ] = np.where(shared_left & ~shared_right, pairs[1], pairs[0])[place.ravel()]
            self.atoms.bind(pairs[0, bound], pairs[1, bound])
        return self.atoms.find(result)

    def adopt(self, candidates: Sequence[Labels], labels: Labels | None) -> Labels | None:
        """Cut a parameter as what it is combined with, if one of its dimensions goes with that; else have it whole.

        Args:
            candidates: of the parameter, broadcastable to the labels.
            labels: of the other side.

        Returns: labels of the parameter in this place; None: it is whole.
        """
        if labels is not None and (labels > 0).all():
            labels = self.atoms.find(thin(labels))
            for shared in (False, True):
                for candidate in candidates:
                    if candidate.size > 1 and (candidate > 0).all() and self._follow(candidate, labels, shared=shared):
                        return self.atoms.find(candidate)
        self.memory.fix(list(candidates))
        return None

    def _follow(self, candidate: Labels, labels: Labels, *, shared: bool) -> bool:
        """Have a parameter go with labels: its parts with one label each or, if shared, needed by several each."""
        pairs = np.unique(np.stack([side.ravel() for side in np.broadcast_arrays(candidate, labels)]), axis=1)
        if len(distinct(pairs[1])) < 2 or (_repeated(pairs[1]) if shared else _repeated(pairs[0])).any():
            return False
        if shared:
            self.atoms.need(pairs[1], pairs[0])
        else:
            self.atoms.bind(pairs[0], pairs[1])
        return True


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor of an operation."""

    labels: Labels | None
    full: tuple[bool, ...]
    """For each dimension, whether it has elements of its own there."""

    def aligned(self, rank: int) -> Operand:
        """With as many dimensions as the result, further ones in front."""
        missing = rank - len(self.full)
        labels = None if self.labels is None else self.labels.reshape((1,) * missing + self.labels.shape)
        return Operand(labels, (False,) * missing + self.full)


def _varies(labels: Labels | None, axis: int) -> bool:
    if labels is None or labels.shape[axis] == 1 or labels.strides[axis] == 0:
        return False
    return bool((labels != labels.take([0], axis)).any())


def _repeated(values: Labels) -> NDArray[np.bool_]:
    """Which values occur more than once."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return count[place.ravel()] > 1

"""Which atoms the elements of intermediate tensors belong to, by their place in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from shardwright.plans.flow.atoms import Atoms, Labels
from shardwright.plans.flow.record import Ref

MOST_ELEMENTS = 1 << 22
"""Of a view of a parameter that is no mere reordering of its dimensions."""


Origin = tuple[str, int]
"""A parameter, and one of its dimensions."""


@dataclass(frozen=True, slots=True)
class Root:
    """Memory that holds a parameter, or what was computed from one number by number."""

    ref: Ref
    candidates: tuple[Labels, ...]
    """Ways to cut it, each as the atoms of its elements, of size 1 along dimensions in which they do not differ."""
    origins: tuple[Origin, ...]
    """Of each of these ways."""


class Memory:
    """Labels of storages, and the parameters among them."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.roots: dict[int, Root] = {}
        self.zeros: set[int] = set()
        """Storages that hold nothing but zeros."""
        self.constant: set[int] = set()
        """Storages that hold one number: made in the shape of something, which may be a part."""
        self._labels: dict[int, torch.Tensor] = {}
        self._copies: dict[int, torch.Tensor] = {}
        """For storages in which numbers are repeated, such as keys for several query heads: which of them are one."""

    def labels(self, ref: Ref) -> Labels | None:
        """Of the elements of a tensor, or a broadcast view of them; None: every rank has all of it."""
        flat = self._labels.get(ref.storage)
        if flat is None:
            return None
        found = _compact(flat.as_strided(ref.size, ref.stride, ref.offset)).numpy()
        for axis, size in enumerate(found.shape):
            if size > 1 and (found == (first := found.take([0], axis))).all():
                found = first
        found = self.atoms.find(found)
        return np.broadcast_to(found, ref.size) if found.any() else None

    def write(self, ref: Ref, labels: Labels | None) -> None:
        """Give the elements of a tensor their labels."""
        flat = self._labels.get(ref.storage)
        self.zeros.discard(ref.storage)
        self.constant.discard(ref.storage)
        if flat is None:
            if labels is None or not labels.any():
                return
            flat = self._labels[ref.storage] = torch.zeros(ref.capacity, dtype=torch.int64)
        target = flat.as_strided(ref.size, ref.stride, ref.offset)
        if labels is None:
            target.zero_()
        else:
            target.copy_(torch.from_numpy(thin(labels).copy()))

    def replace(self, storage: int, old: int, new: int) -> None:
        """Write another label wherever a storage has this one."""
        if (flat := self._labels.get(storage)) is not None:
            flat[flat == old] = new

    def full(self, ref: Ref) -> tuple[bool, ...]:
        """For each dimension of a tensor, whether it has numbers of its own there, and not copies or a constant."""
        if ref.storage in self.constant:
            return (False,) * len(ref.size)
        flat = self._copies.get(ref.storage)
        if flat is None:
            return tuple(size > 1 and stride != 0 for size, stride in zip(ref.size, ref.stride, strict=True))
        numbers = flat.as_strided(ref.size, ref.stride, ref.offset)
        return tuple(
            size > 1 and bool((numbers != numbers.narrow(axis, 0, 1)).any()) for axis, size in enumerate(ref.size)
        )

    def note_copies(self, source: Ref, out: Ref) -> None:
        """A tensor was computed from another, number by number: what is a copy there, is one here."""
        flat = self._copies.get(source.storage)
        if source.size != out.size or out.capacity > MOST_ELEMENTS:
            return
        if flat is not None:
            numbers = flat.as_strided(source.size, source.stride, source.offset)
        elif any(size > 1 and stride == 0 for size, stride in zip(source.size, source.stride, strict=True)):
            compact = [1 if stride == 0 else size for size, stride in zip(source.size, source.stride, strict=True)]
            numbers = torch.arange(math.prod(compact)).view(compact).expand(source.size)
        else:
            return
        made = torch.zeros(out.capacity, dtype=torch.int64)
        made.as_strided(out.size, out.stride, out.offset).copy_(numbers)
        self._copies[out.storage] = made

    def candidates(self, ref: Ref) -> list[Labels] | None:
        """Ways to cut a view of a parameter, broadcastable to it; None if it is no parameter.

        A view that cannot be understood has none, and its parameter can't be cut.
        """
        root = self.roots.get(ref.storage)
        if root is None:
            return None
        places = dimension_indices(root.ref, ref)
        if places is None:
            self.fix(root.candidates)
            return []
        rank = len(ref.size)
        found = []
        for candidate in root.candidates:
            index = tuple(
                place if size > 1 else np.zeros((1,) * rank, dtype=np.int64)
                for place, size in zip(places, candidate.shape, strict=True)
            )
            found.append(self.atoms.find(candidate[index]))
        return found

    def origins(self, ref: Ref) -> tuple[Origin, ...]:
        """Where the candidates of a view of a parameter come from, in their order."""
        root = self.roots.get(ref.storage)
        return root.origins if root is not None else ()

    def fix(self, candidates: tuple[Labels, ...] | list[Labels]) -> None:
        """Have every rank hold what these would cut."""
        for candidate in candidates:
            self.atoms.bind(candidate.ravel(), np.zeros(1, dtype=np.int64))


def dimension_indices(root: Ref, view: Ref) -> list[Labels] | None:
    """For each dimension of a tensor, the index in it that each element of a view has.

    Returns: arrays that broadcast to the view, one for each dimension of the root, of size 1 along dimensions of the
        view in which they do not differ; None if the view is too large to say.
    """
    dims = [d for d in range(len(root.size)) if root.size[d] > 1]
    digits, offset = {}, view.offset - root.offset
    parts: dict[int, list[Labels]] = {d: [] for d in dims}
    for axis, (size, stride) in enumerate(zip(view.size, view.stride, strict=True)):
        steps = np.arange(size, dtype=np.int64) * stride
        shape = tuple(size if axis == other else 1 for other in range(len(view.size)))
        for d in dims:
            moved = steps // root.stride[d] % root.size[d]
            if moved.any():
                parts[d].append(moved.reshape(shape))
    start = np.full((1,) * len(view.size), offset, dtype=np.int64)
    for d in dims:
        digit = start // root.stride[d] % root.size[d]
        if sum(int(p.max()) for p in parts[d]) + int(digit.max()) >= root.size[d]:
            break  # dimensions of the view run over into the next of the root: count it out
        for part in parts[d]:
            digit = digit + part
        digits[d] = digit
    else:
        return [digits.get(d, start * 0) for d in range(len(root.size))]
    if int(np.prod(view.size)) > MOST_ELEMENTS:
        return None
    for axis, (size, stride) in enumerate(zip(view.size, view.stride, strict=True)):
        shape = tuple(size if axis == other else 1 for other in range(len(view.size)))
        start = start + (np.arange(size, dtype=np.int64) * stride).reshape(shape)
    return [start // root.stride[d] % root.size[d] if d in parts else start * 0 for d in range(len(root.size))]


def _compact(labels: torch.Tensor) -> torch.Tensor:
    """A tensor without the copies that its strides make."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0:
            labels = labels.narrow(axis, 0, min(1, labels.shape[axis]))
    return labels


def thin(labels: Labels) -> Labels:
    """An array without copies along broadcast dimensions: of size 1 there."""
    return labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.strides)]

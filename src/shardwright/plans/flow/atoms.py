"""Atoms, and what binds them to each other.

An atom is one index of one dimension of a parameter, such as row 7 of a query projection: what a rank has or has not.
Label 0 stands for what every rank has.  Two atoms are *bound* if a rank must have both or neither; an atom *needs*
another if a rank that has the first must have the second too, which other ranks may have as well (query and key heads).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""Atoms of the elements of a tensor; 0: every rank has it, below 0: a partial sum (see `propagate`)."""


def distinct(labels: Labels) -> Labels:
    """[n] different numbers in an array, sorted. By sorting: numpy's own way is fifty times slower for many."""
    values = np.sort(labels, axis=None)
    is_new = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    return values[is_new]


class Atoms:
    """Atoms by number, from 1, as a forest of what is bound."""

    def __init__(self) -> None:
        self._parent: Labels = np.zeros(1, dtype=np.int64)
        self._needs: list[Labels] = []

    def new(self, count: int) -> Labels:
        """So many atoms that are bound to nothing."""
        start = len(self._parent)
        made = np.arange(start, start + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, made])
        return made

    def find(self, labels: Labels) -> Labels:
        """One atom for all that are bound to each other; partial sums as they are."""
        roots = np.where(labels > 0, labels, 0)
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        return np.where(labels < 0, labels, roots)

    def bind(self, left: Labels, right: Labels) -> None:
        """Bind atoms pairwise."""
        left, right = np.broadcast_arrays(left, right)
        pairs = np.unique(np.stack([left.ravel(), right.ravel()]), axis=1)
        a, b = self.find(pairs[0]), self.find(pairs[1])
        while (differ := a != b).any():
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            a, b = self.find(low), self.find(self._parent[high])  # of several for one, the losers join the winner

    def need(self, holders: Labels, needed: Labels) -> None:
        """Who has a holder must have what it needs, pairwise."""
        self._needs.append(np.stack([holders.ravel(), needed.ravel()]))

    def needs(self) -> Labels:
        """[2, n] distinct pairs (holder, needed) as they are bound now, without those that need themselves."""
        if not self._needs:
            return np.zeros((2, 0), dtype=np.int64)
        pairs = self.find(np.concatenate(self._needs, axis=1))
        return np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)

    def with_needs_bound(self) -> Atoms:
        """A copy in which an atom is bound to what it needs."""
        pairs = self.needs()
        pairs = pairs[:, (pairs > 0).all(axis=0)]
        made = Atoms()
        made._parent = self._parent.copy()
        made.bind(pairs[0], pairs[1])
        return made

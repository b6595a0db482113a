"""What every rank holds of one dimension of a tensor: how to take a rank's part, and how to put parts together again.

A rank may hold several ranges (its query heads, its key heads, its value heads of a fused projection), and two ranks
may hold the same one (a key head that both need).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardwright.layers.collectives import Collectives

Ranges = tuple[tuple[int, int], ...]
"""First index and the one after the last, of each range that a rank holds, in this order."""


@dataclass(frozen=True)
class Pieces:
    """One dimension, dealt to ranks."""

    ranges: tuple[Ranges, ...]
    """Of each rank; together they cover the dimension."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Length of each rank's part."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @cached_property
    def total(self) -> int:
        """Length of the dimension."""
        return max(stop for ranges in self.ranges for _, stop in ranges)

    def take(self, tensor: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's part of a whole tensor: a view where it is one range."""
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in joined(self.ranges[rank])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def gather(self, part: Tensor, collectives: Collectives) -> Tensor:
        """The whole last dimension, on every rank.

        Args:
            part: [..., sizes[rank]].
            collectives: of the ranks.

        Returns: [..., total].
        """
        return self._restore(collectives.all_gather(part, self.sizes))

    def gather_first(self, part: Tensor, collectives: Collectives) -> Tensor:
        """As `gather`, on rank 0 alone; elsewhere zeros of the same shape, which nobody should read."""
        gathered = collectives.gather(part, self.sizes)
        return part.new_zeros(*part.shape[:-1], self.total) if gathered is None else self._restore(gathered)

    def _restore(self, gathered: Tensor) -> Tensor:
        places = self._places
        return gathered if places is None else gathered.index_select(-1, places.to(gathered.device))

    @cached_property
    def _places(self) -> Tensor | None:
        """Where each index of the dimension is among the gathered parts, the first place if several; None: in order."""
        held = [index for ranges in self.ranges for start, stop in ranges for index in range(start, stop)]
        if held == list(range(self.total)):
            return None
        places = dict(zip(reversed(held), range(len(held) - 1, -1, -1), strict=True))
        return torch.tensor([places[index] for index in range(self.total)])


def joined(ranges: Ranges) -> list[tuple[int, int]]:
    """The same indices with neighbouring ranges as one; a rank that holds nothing has one empty range."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return found or [(0, 0)]

"""What one rank holds of a resolved plan: the part of each tensor, by name. Sharding and loading read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.layers.parallel_pieces import Pieces, joined
from shardwright.plans.table import ParameterRow, ShardTable


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """One rank of one stage."""

    table: ShardTable
    stage: int
    rank: int
    """Tensor-parallel rank in its stage."""

    def holds(self, name: str) -> bool:
        """Whether this rank has any use for a tensor: it is on its stage, or it is none of the table's (a buffer)."""
        row = self.table.by_name.get(name)
        return row is None or self.stage in row.stages

    def is_zero(self, name: str) -> bool:
        """Whether this rank holds zeros in place of the values: another rank adds them."""
        row = self.table.by_name.get(name)
        return row is not None and row.once and self.rank > 0

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the whole tensor; None if the table knows nothing of it."""
        row = self.table.by_name.get(name)
        return None if row is None else row.shape

    def cut(self, name: str) -> tuple[int, list[tuple[int, int]]] | None:
        """Dimension, and ranges of it that this rank holds, in order; None if it holds all of the tensor."""
        row = self.table.by_name.get(name)
        return None if row is None or row.dim is None else (row.dim, joined(row.ranges[self.rank]))

    def take(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor: a view where it can be one."""
        if self.is_zero(name):
            return torch.zeros_like(whole)
        row = self.table.by_name.get(name)
        return whole if row is None or row.dim is None else Pieces(row.ranges).take(whole, self.rank, row.dim)

    def empty_like(self, row: ParameterRow, whole: Tensor) -> Tensor:
        """A tensor on "meta" of the shape that this rank holds."""
        return torch.empty(row.local_shape(self.rank), dtype=whole.dtype, device="meta")

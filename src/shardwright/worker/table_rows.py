"""Block tables of the running sequences, as one model of a rank reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from shardwright.worker.batch import TableUpdate
from shardwright.worker.step import Ints, Tables


class TableRows:
    """Block tables by row.

    Args:
        num_groups: cache groups of the model.
        num_rows, max_blocks: sizes of each table.
        places: per cache group that updates name, the place of the model's own; None: it has no layer of that group.
            Default: they are the same.
    """

    def __init__(
        self, num_groups: int, *, num_rows: int, max_blocks: int, places: Sequence[int | None] | None = None
    ) -> None:
        self.tables: list[Tables] = [np.zeros((num_rows, max_blocks), dtype=np.int32) for _ in range(num_groups)]
        """Per group of the model, [num_rows, max_blocks]."""
        self._places = range(num_groups) if places is None else places

    def take_in(self, updates: Iterable[TableUpdate]) -> None:
        """Write down what a batch tells; groups of other ranks' layers are passed over."""
        for update in updates:
            place = self._places[update.group]
            if place is not None:
                self.tables[place][update.row, update.start : update.start + len(update.blocks)] = update.blocks

    def blocks(self, row: int, num_blocks: int) -> list[Ints]:
        """Per group, the first blocks of a row."""
        return [table[row, :num_blocks].astype(np.int64) for table in self.tables]

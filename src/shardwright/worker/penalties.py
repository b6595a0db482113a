"""Repetition, presence and frequency penalties, at a cost that grows with the tokens seen, not with the vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_FIRST_CAPACITY = 256


class PenaltyTable:
    """Which tokens the penalties of each row touch, and how often each was generated.

    The tables are on the host and are made when the first row asks for penalties; the memory of a row is taken when it
    is first used.

    Args:
        max_num_seqs: number of rows.
        vocab_size: number of logits.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._shape = (max_num_seqs, vocab_size)
        self._counts: npt.NDArray[np.int32] | None = None
        self._is_listed: npt.NDArray[np.bool_] | None = None
        # Row by row the tokens to touch, each once. Beyond `_num_listed`, ids that are listed or have nothing to be
        # penalized for.
        self._listed = np.zeros((max_num_seqs, 0), np.int64)
        self._num_listed = np.zeros(max_num_seqs, np.int64)
        self.repetition: Floats = np.ones(max_num_seqs, np.float32)
        self.presence: Floats = np.zeros(max_num_seqs, np.float32)
        self.frequency: Floats = np.zeros(max_num_seqs, np.float32)

    def set_row(self, row: int, *, prompt_token_ids: Ints, output_token_ids: Ints) -> None:
        """Start a row anew, its three penalties being set. The prompt counts for the repetition penalty only."""
        counts, is_listed = self._tables()
        counts[row] = 0
        np.add.at(counts[row], output_token_ids, 1)
        seen = output_token_ids
        if self.repetition[row] != 1:
            seen = np.concatenate([prompt_token_ids, output_token_ids])
        distinct = np.unique(seen)
        is_listed[row] = False
        is_listed[row, distinct] = True
        self._make_room(len(distinct))
        self._listed[row] = distinct[0] if len(distinct) else 0
        self._listed[row, : len(distinct)] = distinct
        self._num_listed[row] = len(distinct)

    def append(self, rows: Ints, token_ids: Ints) -> None:
        """Count one generated token in each of the rows, which are distinct and have been set."""
        counts, is_listed = self._tables()
        counts[rows, token_ids] += 1
        is_new = ~is_listed[rows, token_ids]
        new_rows, new_ids = rows[is_new], token_ids[is_new]
        if len(new_rows):
            self._make_room(int(self._num_listed[new_rows].max()) + 1)
            self._listed[new_rows, self._num_listed[new_rows]] = new_ids
            self._num_listed[new_rows] += 1
            is_listed[new_rows, new_ids] = True

    def apply(self, scores: Tensor, places: Ints, rows: Ints) -> None:
        """Change the logits of some rows in place, first by repetition, then by frequency and presence.

        Args:
            scores: [n, vocab], float32.
            places: which rows of `scores`.
            rows: which rows of this table, one for each place.
        """
        counts, _ = self._tables()
        width = int(self._num_listed[rows].max())
        if width == 0:
            return
        listed = self._listed[rows, :width]
        count = counts[rows[:, None], listed].astype(np.float32)
        subtracted = self.frequency[rows, None] * count + self.presence[rows, None] * (count > 0)
        place, ids, off = (torch.from_numpy(array).to(scores.device) for array in (places[:, None], listed, subtracted))
        repetition = torch.from_numpy(self.repetition[rows, None]).to(scores.device)
        values = scores[place, ids]
        values = torch.where(values > 0, values / repetition, values * repetition)
        # An id may stand in a row more than once, always with the same value.
        scores[place, ids] = values - off

    def _tables(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        if self._counts is None or self._is_listed is None:
            self._counts, self._is_listed = np.zeros(self._shape, np.int32), np.zeros(self._shape, np.bool_)
        return self._counts, self._is_listed

    def _make_room(self, width: int) -> None:
        capacity = self._listed.shape[1]
        if width > capacity:
            more = max(width, 2 * capacity, _FIRST_CAPACITY) - capacity
            first = self._listed[:, :1] if capacity else np.zeros((self._shape[0], 1), np.int64)
            self._listed = np.concatenate([self._listed, np.repeat(first, more, axis=1)], axis=1)

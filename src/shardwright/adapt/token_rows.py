"""Tensors with a number of tokens in some dimension, as rows of the cache: one row a token, bit by bit as they were."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenTensor:
    """A tensor that holds something of each token of one sequence, or of several."""

    shape: tuple[int, ...]
    """Its numbers of tokens and of sequences may differ."""
    token_dim: int
    dtype: torch.dtype
    batch_dim: int | None = None
    """None: it holds one sequence, whatever its dimensions are."""

    def width(self, dtype: torch.dtype) -> int:
        """Numbers of a row, in a cache of this dtype."""
        return prod(self._others) * max(self.dtype.itemsize // dtype.itemsize, 1)

    def rows(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor as rows of a cache of this dtype: [S * T, width], a sequence after another.

        A larger type takes several numbers for one.
        """
        rows = tensor.movedim(self._dims, tuple(range(len(self._dims)))).reshape(-1, prod(self._others)).contiguous()
        return rows.view(dtype) if self.dtype.itemsize >= dtype.itemsize else rows.to(dtype)

    def tensor(self, rows: Tensor, num_sequences: int = 1) -> Tensor:
        """What such rows, [S * T, width], were: a tensor of this dtype, with S sequences of T tokens."""
        kept = rows.view(self.dtype) if self.dtype.itemsize >= rows.dtype.itemsize else rows.to(self.dtype)
        lengths = [-1] if self.batch_dim is None else [num_sequences, -1]
        return kept.view(*lengths, *self._others).movedim(tuple(range(len(lengths))), self._dims).contiguous()

    @property
    def _dims(self) -> tuple[int, ...]:
        return (self.token_dim,) if self.batch_dim is None else (self.batch_dim, self.token_dim)

    @property
    def _others(self) -> list[int]:
        return [size for dim, size in enumerate(self.shape) if dim not in self._dims]

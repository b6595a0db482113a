"""Tensors with a number of tokens in some dimension, as rows of the cache: one row a token, bit by bit as they were."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenTensor:
    """A tensor that holds something of each token."""

    shape: tuple[int, ...]
    """Its number of tokens may differ."""
    token_dim: int
    dtype: torch.dtype

    def width(self, dtype: torch.dtype) -> int:
        """Numbers of a row, in a cache of this dtype."""
        return self._elements * max(self.dtype.itemsize // dtype.itemsize, 1)

    def rows(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor as rows of a cache of this dtype: [T, width]. A larger type takes several numbers for one."""
        rows = tensor.movedim(self.token_dim, 0).reshape(tensor.shape[self.token_dim], self._elements).contiguous()
        return rows.view(dtype) if self.dtype.itemsize >= dtype.itemsize else rows.to(dtype)

    def tensor(self, rows: Tensor) -> Tensor:
        """What such rows, [T, width], were: a tensor of this shape and dtype, with T tokens."""
        kept = rows.view(self.dtype) if self.dtype.itemsize >= rows.dtype.itemsize else rows.to(self.dtype)
        others = [size for dim, size in enumerate(self.shape) if dim != self.token_dim]
        return kept.view(len(rows), *others).movedim(0, self.token_dim).contiguous()

    @property
    def _elements(self) -> int:
        return prod(size for dim, size in enumerate(self.shape) if dim != self.token_dim)

"""What parallel layers ask of the ranks that hold the other parts of a tensor.

The layers do not know who carries it out: process groups when a model is served, threads of one process when a plan is
proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """The tensor-parallel ranks of one pipeline stage. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of tensors of one shape, on every rank; `tensor` may be written over."""
        ...

    def all_gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Parts of the last dimension, `sizes[rank]` long, one after another, on every rank."""
        ...

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """As `all_gather`, but on rank 0 alone; None elsewhere."""
        ...

"""What code adds to attention scores by distance, read off its numbers: slopes (ALiBi), or relative positions.

A number that is added to all scores of a query changes nothing, so a slope may count positions of keys as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError

TOLERANCE = 1e-4
"""Largest misfit, relative to the largest bias."""

ROUNDINGS = 4
"""So many times a bias may have been rounded to the type that it is added in, on top of that."""


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """What is added to scores, by head and by the distance from query back to key."""

    slopes_H: Tensor
    """[H] float32: what each further position adds."""
    table_HN: Tensor | None = None
    """[H, N] float32, in place of slopes: for the distances that were seen."""
    is_settled: bool = True
    """Longer distances than those of the table are known to have the bias of its last."""

    def of_heads(self, heads: Tensor) -> Bias:
        """The bias of some heads ([H] int64)."""
        return replace(
            self, slopes_H=self.slopes_H[heads], table_HN=None if self.table_HN is None else self.table_HN[heads]
        )

    def at(self, distances: Tensor) -> Tensor:
        """The bias of these distances, if they are known: [H, *distances.shape]."""
        if self.table_HN is None:
            return self.slopes_H.view(-1, *[1] * distances.ndim) * distances
        return self.table_HN[:, distances.clamp_max(self.table_HN.shape[1] - 1)]

    def over(self, num_distances: int) -> Tensor:
        """The bias of so many distances: [H, num_distances].

        Raises: UnsupportedModelError if that many are not known.
        """
        if self.table_HN is None:
            return self.at(torch.arange(num_distances, device=self.slopes_H.device))
        known = self.table_HN.shape[1]
        if num_distances <= known:
            return self.table_HN[:, :num_distances]
        if not self.is_settled:
            raise UnsupportedModelError(f"it adds a bias of which only the first {known:,} distances are known")
        return self.table_HN


def read_bias(added_HTT: Tensor, seen_TT: Tensor, *, precision: float, ignores_rows: bool = True) -> Bias | None:
    """Understand what is added to scores.

    Args:
        added_HTT: [H, T, T] float32.
        seen_TT: [T, T] bool: where a query sees a key; each sees its own.
        precision: to which the numbers may be rounded.
        ignores_rows: whether adding another number to every row changes nothing.

    Returns: None if nothing is added.
    Raises: UnsupportedModelError if it depends on more than head and distance.
    """
    bound = added_HTT.masked_fill(~seen_TT, 0).abs().amax(-1, keepdim=True)
    bound = TOLERANCE * bound.max() + 2 * ROUNDINGS * precision * bound
    own = torch.diagonal(added_HTT, dim1=-2, dim2=-1)[..., None] if ignores_rows else 0
    added = (added_HTT - own).masked_fill(~seen_TT, 0)
    if bool((added.abs() <= bound).all()):
        return None
    found = _by_distance(added, seen_TT, bound)
    if found is None:
        raise UnsupportedModelError("it adds a bias that depends on more than the distance from query to key")
    return found


def _by_distance(added: Tensor, seen: Tensor, bound: Tensor) -> Bias | None:
    """The bias that gives these numbers within the bound, if there is one."""
    length = added.shape[-1]
    positions = torch.arange(length, device=added.device)
    distances = (positions[:, None] - positions).clamp_min(0)
    weight = distances * seen
    slopes = (added * weight).sum((-2, -1)) / weight.square().sum().clamp_min(1)
    if bool(((added - slopes[:, None, None] * distances).masked_fill(~seen, 0).abs() <= bound).all()):
        return Bias(slopes)
    counts = torch.bincount(distances[seen], minlength=length)
    sums = added.new_zeros(added.shape[0], length, dtype=torch.float64)
    sums.index_add_(1, distances[seen], added[:, seen].double())  # exact where all are the same
    table = (sums / counts.clamp_min(1)).float()
    if bool(((added - table[:, distances]).masked_fill(~seen, 0).abs() > bound).any()):
        return None
    known = int(counts.count_nonzero())
    table = table[:, :known].contiguous()
    settled = table[:, known // 2 :]
    return Bias(slopes, table, is_settled=bool((settled == settled[:, -1:]).all()))

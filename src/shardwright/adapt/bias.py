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


def read_bias(
    added_HRT: Tensor, seen_RT: Tensor, rows_R: Tensor, *, precision: float, ignores_rows: bool = True
) -> Bias | None:
    """Understand what is added to scores.

    Args:
        added_HRT: [H, R, T] float32.
        seen_RT: [R, T] bool: where a query sees a key; each sees its own.
        rows_R: [R] int64, positions of the queries, in order.
        precision: to which the numbers may be rounded.
        ignores_rows: whether adding another number to every row changes nothing.

    Returns: None if nothing is added.
    Raises: UnsupportedModelError if it depends on more than head and distance.
    """
    bound = added_HRT.masked_fill(~seen_RT, 0).abs().amax(-1, keepdim=True)
    bound = TOLERANCE * bound.max() + 2 * ROUNDINGS * precision * bound
    added = (added_HRT - (own_column(added_HRT, rows_R) if ignores_rows else 0)).masked_fill(~seen_RT, 0)
    if bool((added.abs() <= bound).all()):
        return None
    distances = distances_from(rows_R, added.shape[-1])
    weight = distances * seen_RT
    slopes = (added * weight).sum((-2, -1)) / weight.square().sum().clamp_min(1)
    straight = (slopes[:, None, None] * distances).masked_fill(~seen_RT, 0)
    if bool(((added - straight).abs() <= bound).all()):
        return Bias(slopes)
    counts = torch.bincount(distances[seen_RT], minlength=added.shape[-1])
    sums = added.new_zeros(len(added), added.shape[-1], dtype=torch.float64)
    sums.index_add_(1, distances[seen_RT], added[:, seen_RT].double())  # exact where all are the same
    table = (sums / counts.clamp_min(1)).float()
    if bool(((added - table[:, distances]).masked_fill(~seen_RT, 0).abs() > bound).any()):
        raise UnsupportedModelError("it adds a bias that depends on more than the distance from query to key")
    table = table[:, : int(counts.count_nonzero())].contiguous()
    settled = table[:, table.shape[1] // 2 :]
    return Bias(slopes, table, is_settled=bool((settled == settled[:, -1:]).all()))


def own_column(values_HRT: Tensor, rows_R: Tensor) -> Tensor:
    """Of each query, the number at its own position: [H, R, 1]."""
    index = rows_R.view(1, -1, 1).expand(len(values_HRT), -1, 1)
    return values_HRT.gather(-1, index)


def distances_from(rows_R: Tensor, length: int) -> Tensor:
    """From queries back to keys, zero for keys after them: [R, length] int64."""
    return (rows_R[:, None] - torch.arange(length, device=rows_R.device)).clamp_min(0)

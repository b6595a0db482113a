"""Is what the ranks have together what the model has? Whole on every rank, in parts, or as sums yet to be added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from shardwright.plans.groups import Ranges
from shardwright.plans.table import ParameterRow

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number of an output. A number of float32 has 24 bits, 6e-8 of it; sums in
another order over some thousand features differ by 1e-6, and dozens of layers bring that to 1e-5. A mistake in a plan
shows as 1e-2 to 1."""


class State(StrEnum):
    """How an output lies on the ranks."""

    WHOLE = "whole"
    PART = "a part on each rank"
    PARTIAL_SUM = "sums that are yet to be added up"
    NOTHING = "nothing to compare"
    DIVERGED = "something else"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output of the model beside the ranks'."""

    state: State
    max_abs_diff: float | None
    """From what it should be, in its state; if it has diverged, from the whole; None if no shape fits."""
    tolerance: float


@dataclass(frozen=True, slots=True)
class Slicing:
    """A way in which a dimension can be cut."""

    length: int
    per_rank: tuple[Ranges, ...]

    def indices(self, size: int) -> list[Tensor] | None:
        """Per rank, what it holds of a dimension of another size that is cut alike; None if it cannot be."""
        found = []
        for ranges in self.per_rank:
            pieces = []
            for start, stop in ranges:
                if start * size % self.length or stop * size % self.length:
                    return None
                pieces.append(torch.arange(start * size // self.length, stop * size // self.length))
            found.append(torch.cat(pieces) if pieces else torch.arange(0))
        return found


def slicings(rows: Sequence[ParameterRow]) -> list[Slicing]:
    """The ways in which parameters are cut, each once."""
    found = (Slicing(row.shape[row.dim], row.ranges) for row in rows if row.dim is not None)
    return list(dict.fromkeys(found))


def compare(
    reference: Tensor, ranks: Sequence[Tensor], ways: Sequence[Slicing], *, tolerance: float = TOLERANCE
) -> Comparison:
    """Compare one output of the model with what each rank has in its place.

    Args:
        reference: of the unsharded model.
        ranks: of the same call on every rank.
        ways: in which it may be cut.
        tolerance: relative to the largest number in `reference`.

    Returns: the first state in which there is no difference that counts; else DIVERGED.
    """
    if reference.numel() == 0:
        return Comparison(State.NOTHING, 0.0, 0.0)
    finite = reference[reference.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    allowed = tolerance * max(scale, 1e-6)
    if all(part.shape == reference.shape for part in ranks):
        whole = max(difference(reference, part) for part in ranks)
        if whole <= allowed:
            return Comparison(State.WHOLE, whole, allowed)
        total = difference(reference, torch.stack(list(ranks)).sum(0)) if len(ranks) > 1 else whole
        if total <= allowed:
            return Comparison(State.PARTIAL_SUM, total, allowed)
        return Comparison(State.DIVERGED, whole, allowed)
    return _compare_parts(reference, ranks, ways, allowed)


def _compare_parts(reference: Tensor, ranks: Sequence[Tensor], ways: Sequence[Slicing], allowed: float) -> Comparison:
    if any(part.ndim != reference.ndim for part in ranks):
        return Comparison(State.DIVERGED, None, allowed)
    dims = {dim for part in ranks for dim in range(part.ndim) if part.shape[dim] != reference.shape[dim]}
    if len(dims) != 1:
        return Comparison(State.DIVERGED, None, allowed)
    dim = dims.pop()
    best: float | None = None
    for way in ways:
        indices = way.indices(reference.shape[dim])
        if indices is None or any(len(i) != part.shape[dim] for i, part in zip(indices, ranks, strict=True)):
            continue
        worst = max(difference(reference.index_select(dim, i), part) for i, part in zip(indices, ranks, strict=True))
        if worst <= allowed:
            return Comparison(State.PART, worst, allowed)
        best = worst if best is None else min(best, worst)
    return Comparison(State.DIVERGED, best, allowed)


def difference(expected: Tensor, actual: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape; infinite if one has a number where the other has none.

    Equal infinities and NaNs in the same places do not differ.
    """
    if expected.numel() == 0:
        return 0.0
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    gaps = torch.where(same, 0.0, (expected.double() - actual.double()).abs())
    return float(torch.where(gaps.isnan(), float("inf"), gaps).max())

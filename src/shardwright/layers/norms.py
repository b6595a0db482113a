"""Which modules are norms: found by what they do to random numbers, not by what they are called.

A module is one if, whatever its parameters, it gives for every row what `kernels.norm.norm` gives with them. Where it
rounds to the type of its input is found out too, so that what takes its place rounds there as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shardwright.kernels.norm import NormKind, norm

NUM_ROWS = 6
TINY = 1e-8
"""Numbers next to whose squares any epsilon is large."""
NO_EPSILON = 1e-15
TRIALS = (((3,), 1.0), ((1, 5), 1e-3), ((2, 2, 3), 50.0), ((1,), 1e-6), ((7,), 0.02))
"""Shapes before the last dimension, and scales."""
TOLERANCE = 2e-5
"""Of the largest difference in float32, against the largest number."""
MOST_ROUNDED_OTHERWISE = 0.02
"""Part of the numbers of a smaller type that may be rounded to the neighbour."""


class _NoNorm(Exception):
    """A module does something else."""


@dataclass(frozen=True, slots=True)
class FoundNorm:
    """A module that is a norm."""

    kind: NormKind
    weight: str
    bias: str | None
    """Names of its parameters."""


@torch.no_grad()
def as_norm(module: nn.Module) -> FoundNorm | None:
    """What norm a module is; None if it is none."""
    parameters = dict(module.named_parameters(recurse=False))
    shapes = {parameter.shape for parameter in parameters.values()}
    if any(True for _ in module.children()) or not 1 <= len(parameters) <= 2 or len(shapes) > 1:
        return None
    [shape] = shapes
    if len(shape) != 1 or shape[0] < 2 or not all(part.is_contiguous() for part in parameters.values()):
        return None
    try:
        return _Trial(module).found()
    except Exception:  # its code may want other arguments, or do anything with these
        return None


class _Trial:
    """A copy of a module that gets numbers of ours.

    Args:
        module: without children, with one or two parameters of one dimension and size.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = [name for name, _ in module.named_parameters(recurse=False)]
        self._copy = copy.deepcopy(module).eval()
        first = next(module.parameters())
        self._dtype, self._device, self._size = first.dtype, first.device, len(first)
        self._generator = torch.Generator().manual_seed(0)

    def found(self) -> FoundNorm:
        """What norm it is. Raises _NoNorm, or what its code raises."""
        self._copy.float()
        rows = self._numbers(NUM_ROWS, self._size) + 0.5
        plain = self._run(rows, {})
        changes = {name: self._run(rows, {name: 1.0}) - plain for name in self._names}
        biases = [name for name, change in changes.items() if bool(((change - 1).abs() < TOLERANCE).all())]
        weights = [name for name in self._names if name not in biases]
        if len(weights) != 1:
            raise _NoNorm
        [weight], bias = weights, next(iter(biases), None)
        normed = changes[weight]
        centered = rows - rows.mean(-1, keepdim=True)
        is_centered = _cosine(normed, centered) > _cosine(normed, rows)
        largest = normed.abs().argmax(-1, keepdim=True)
        offset = float((plain.gather(-1, largest) / normed.gather(-1, largest)).median())
        offset = round(offset, 3) if abs(offset - round(offset, 3)) < TOLERANCE else offset
        found = FoundNorm(NormKind(is_centered, self._epsilon(weight, is_centered), offset, False), weight, bias)
        for shape, scale in TRIALS:
            self._check(found, shape, scale)
        return found if self._dtype is torch.float32 else self._rounded(found)

    def _epsilon(self, weight: str, is_centered: bool) -> float:
        """From rows next to which it is all that counts."""
        rows = TINY * (self._numbers(NUM_ROWS, self._size) + 0.5)
        normed = self._run(rows, {weight: 1.0}) - self._run(rows, {})
        values = (rows - rows.mean(-1, keepdim=True) if is_centered else rows).double()
        factor = (normed * values).sum(-1) / values.square().sum(-1)
        epsilon = float((1 / factor.square() - values.square().mean(-1)).median())
        if epsilon < NO_EPSILON:
            return 0.0
        simple = float(f"{epsilon:.3g}")
        return simple if abs(simple - epsilon) < 1e-4 * epsilon else epsilon

    def _check(self, found: FoundNorm, shape: tuple[int, ...], scale: float) -> None:
        parameters = self._randomized()
        rows = scale * (self._numbers(*shape, self._size) + 0.1)
        given = rows.clone()
        actual = self._copy(given)
        expected = _norm(rows, parameters, found)
        if actual.shape != rows.shape or actual.dtype != rows.dtype or not torch.equal(given, rows):
            raise _NoNorm
        if not bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max()):
            raise _NoNorm

    def _rounded(self, found: FoundNorm) -> FoundNorm:
        """With the place at which it rounds, as a module of its own type."""
        self._copy = copy.deepcopy(self._module).eval()
        parameters = self._randomized()
        rows = (self._numbers(8, self._size) + 0.1).to(self._dtype)
        actual = self._copy(rows)
        if actual.dtype != rows.dtype:
            raise _NoNorm
        kinds = [replace(found, kind=replace(found.kind, rounds_first=first)) for first in (False, True)]
        differs = [float((_norm(rows, parameters, kind) != actual).float().mean()) for kind in kinds]
        if not min(differs) <= MOST_ROUNDED_OTHERWISE:
            raise _NoNorm
        return kinds[differs.index(min(differs))]

    def _run(self, rows: Tensor, parameters: dict[str, float]) -> Tensor:
        """With parameters filled with numbers, 0 where none is given."""
        for name, parameter in self._copy.named_parameters(recurse=False):
            parameter.fill_(parameters.get(name, 0.0))
        output = self._copy(rows.clone())
        if not isinstance(output, Tensor) or output.shape != rows.shape:
            raise _NoNorm
        return output

    def _randomized(self) -> Mapping[str, Tensor]:
        parameters = dict(self._copy.named_parameters(recurse=False))
        for parameter in parameters.values():
            parameter.copy_(self._numbers(self._size))
        return parameters

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)


def _norm(rows: Tensor, parameters: Mapping[str, Tensor], found: FoundNorm) -> Tensor:
    bias = None if found.bias is None else parameters[found.bias]
    return norm(rows, parameters[found.weight], bias, found.kind)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-30))

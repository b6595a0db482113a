"""The resolved plan: one row for every parameter. Loader, layers, memory estimate, report and proof read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from shardwright.plans.groups import Ranges, UnitGroup, UnitKind
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.styles import REPLICATE, Style
from shardwright.weight_format import WeightFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterRow:
    """Where the parts of one parameter are."""

    name: str
    """Qualified name, the first of a tied one's."""
    aliases: tuple[str, ...] = ()
    """Its other names, if modules share it."""
    shape: tuple[int, ...]
    element_bytes: int
    """As the model is built."""
    quantized: WeightFormat | None = None
    """How its numbers are kept once they are loaded, if not so."""
    input_dim: int = 1
    """The dimension that quantized groups lie along."""
    style: Style = REPLICATE
    word: str = REPLICATE.name
    """Of the style, as the plan says it."""
    matched_by: str | None = None
    """The pattern of the plan; None: the plan says nothing of it."""
    dim: int | None = None
    """The dimension that is cut; None: every rank of its stages holds all of it."""
    unit: int = 1
    """Length of the pieces that are never cut, in the first segment."""
    ranges: tuple[Ranges, ...] = ()
    """Per TP rank, what it holds of `dim`, in this order; two ranks may hold the same. Empty if nothing is cut."""
    once: bool = False
    """Bias of a row-cut product: the first rank adds it, the others hold zeros."""
    stages: tuple[int, ...] = (0,)
    """Pipeline stages that hold it."""

    def pieces(self, ranks: int) -> list[int]:
        """Length of `dim` on each TP rank; of the first dimension if nothing is cut."""
        if self.dim is None:
            return [self.shape[0] if self.shape else 1] * ranks
        return [sum(stop - start for start, stop in ranges) for ranges in self.ranges]

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Of what a TP rank holds."""
        if self.dim is None:
            return self.shape
        length = sum(stop - start for start, stop in self.ranges[rank])
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def local_bytes(self, rank: int) -> int:
        """Of what a TP rank of its stages holds, when it serves."""
        return self._bytes_of(self.local_shape(rank))

    @property
    def whole_bytes(self) -> int:
        """Of all of it, likewise."""
        return self._bytes_of(self.shape)

    def _bytes_of(self, shape: tuple[int, ...]) -> int:
        if self.quantized is None:
            return prod(shape) * self.element_bytes
        return self.quantized.num_bytes(outputs=shape[1 - self.input_dim], inputs=shape[self.input_dim])


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of the pipeline."""

    index: int
    modules: tuple[str, ...]
    """Qualified names of what it runs, in order: layers, and what stands before and after them."""
    layers: tuple[str, ...]
    """Those of them that are layers."""


@dataclass(frozen=True, slots=True)
class Undealt:
    """A group that the plan cuts, and every rank holds all of: it has fewer units than there are ranks, or these lie in
    fewer quantized groups.
    """

    kind: UnitKind
    units: int
    group_size: int | None
    """Of quantized groups, if they are why."""
    modules: tuple[str, ...]
    """Qualified names of modules and parameters that are whole."""


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """A plan, resolved for one model and one number of ranks."""

    plan: ParallelPlan
    tp: int
    pp: int
    parameters: tuple[ParameterRow, ...]
    modules: Mapping[str, Style]
    """Styles of modules that do something with their inputs or outputs, by qualified name."""
    groups: tuple[UnitGroup, ...]
    """Those of the model, whether the plan cuts them or not."""
    stages: tuple[Stage, ...]
    undealt: tuple[Undealt, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, ParameterRow]:
        """Rows by every name that a parameter has."""
        return {name: row for row in self.parameters for name in (row.name, *row.aliases)}

    def weight_bytes(self, stage: int, tp_rank: int) -> int:
        """What one rank holds."""
        return sum(row.local_bytes(tp_rank) for row in self.parameters if stage in row.stages)

    def ranks(self) -> list[tuple[int, int]]:
        """(stage, TP rank) of every rank, in the order of their numbers: ranks of a stage are neighbours."""
        return [(stage, rank) for stage in range(self.pp) for rank in range(self.tp)]

"""Deal the dimensions of a model's parameters to ranks: those of a group by its units, others by their indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.errors import PlanError
from shardwright.plans.groups import Member, Range, Ranges, UnitGroup, deal, ranges_of_all
from shardwright.plans.quantization import Quantization
from shardwright.plans.styles import Cut, Input, Output, Style


@dataclass(frozen=True, slots=True)
class Part:
    """How a dimension is cut."""

    unit: int
    """Length of the pieces that are never cut, in the first segment."""
    ranges: tuple[Ranges, ...]
    """Per rank."""


class Deal:
    """What ranks hold of the dimensions of a model.

    Args:
        groups: of its dimensions.
        ranks: how many.
        quantization: of its weights, which are cut between quantized groups.
    """

    def __init__(self, groups: Sequence[UnitGroup], ranks: int, quantization: Quantization | None) -> None:
        self._ranks = ranks
        self._quantization = quantization
        self.unplaced: set[str] = set()
        """Modules whose parameters belong to no group, and cannot be dealt without cutting quantized groups."""
        self._pieces: dict[int, list[Range]] = {}
        self._by_dimension: dict[tuple[str, int], tuple[UnitGroup, list[Member]]] = {}
        for group in groups:
            for member in group.members:
                self._by_dimension.setdefault((member.name, member.dim), (group, []))[1].append(member)

    def part(self, names: Sequence[str], dim: int, length: int, style: Style) -> Part | None:
        """How one dimension of a parameter is cut; None if quantized groups keep it from being cut.

        Args:
            names: of the parameter.
            dim: which of its dimensions.
            length: of that.
            style: of the parameter.

        Raises: PlanError if there are more ranks than units.
        """
        found = next((self._by_dimension[n, dim] for n in names if (n, dim) in self._by_dimension), None)
        if found is not None:
            group, members = found
            ranges = tuple(ranges_of_all(members, group.units, piece) for piece in self._pieces_of(group))
            if not is_exchanged(style) or is_partition(ranges, length):
                return Part((members[0].segments[0][1] - members[0].segments[0][0]) // members[0].units, ranges)
        ranges = plain_ranges(names[0], length, style, self._ranks, self._quantum_of(style))
        if self._quantization is not None and any(self._quantization.splits(names[0], dim, r) for r in ranges):
            self.unplaced |= {name.rpartition(".")[0] for name in names}
            return None
        return Part(1, ranges)

    def _pieces_of(self, group: UnitGroup) -> list[Range]:
        """Units of each rank."""
        if id(group) not in self._pieces:
            quantum = 1 if self._quantization is None else self._quantization.quantum(group)
            self._pieces[id(group)] = group.pieces(self._ranks, quantum)
        return self._pieces[id(group)]

    def _quantum_of(self, style: Style) -> int:
        """Features of no group that are dealt together: what is cut with a quantized weight is cut as that is."""
        has_features = style.cut in (Cut.COLUMNS, Cut.PACKED_COLUMNS, Cut.ROWS, Cut.PACKED_ROWS)
        return self._quantization.format.group_size if self._quantization is not None and has_features else 1


def is_exchanged(style: Style) -> bool:
    """Whether ranks put their parts together, or take them out of the whole, so that these must follow each other."""
    return style.output is Output.GATHERED or style.input is Input.SPLIT


def is_partition(ranges: Sequence[Ranges], length: int) -> bool:
    """Whether what ranks hold are neighbouring parts of a dimension, in the order of ranks."""
    ends = [(r[0][0], r[0][1]) for r in ranges if len(r) == 1]
    starts = [start for start, _ in ends] + [length]
    return len(ends) == len(ranges) and starts[0] == 0 and [stop for _, stop in ends] == starts[1:]


def plain_ranges(name: str, length: int, style: Style, ranks: int, quantum: int = 1) -> tuple[Ranges, ...]:
    """Ranges of a dimension that belongs to no group: dealt by its indices, packed ones in two halves.

    Args:
        name: of the parameter, for the message.
        length: of the dimension.
        style: of the parameter.
        ranks: to deal to.
        quantum: indices that are dealt together, if there are enough of them.

    Raises: PlanError if there are fewer indices than ranks.
    """
    halves = 2 if style.cut in (Cut.PACKED_COLUMNS, Cut.PACKED_ROWS) else 1
    size = length // halves
    if size < ranks:
        raise PlanError(f"{name} has {size} features to cut, which cannot be dealt to {ranks} ranks")
    if -(-size // quantum) < ranks:
        quantum = 1
    pieces = [(start * quantum, min(stop * quantum, size)) for start, stop in deal(-(-size // quantum), ranks)]
    return tuple(tuple((half * size + start, half * size + stop) for half in range(halves)) for start, stop in pieces)

"""What must be cut together, and in which units.

A plan says which parameters are cut; the *unit group* says where. The heads of an attention, the hidden features of an
MLP, the rows of a vocabulary are dealt to ranks in whole units, and every parameter that has a part in a unit goes with
it: the rows of the query projection, the columns of the output projection. Units are dealt unevenly if they must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import lcm

from shardwright.errors import PlanError

Range = tuple[int, int]
"""First index, and the one after the last."""

Ranges = tuple[Range, ...]
"""What one rank holds of a dimension, in this order."""


class UnitKind(StrEnum):
    """What a unit is."""

    HEADS = "heads"
    FEATURES = "features"
    EXPERTS = "experts"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True, slots=True)
class Member:
    """One dimension of one parameter that is cut with its group.

    Each of its segments falls into `units` equal pieces. Three cases of a fused query, key and value projection with
    8 heads of 64: `[q | k | v]` has three segments of 512; `[q0 k0 v0 | q1 k1 v1 | ...]` has one of 1536; a bias is as
    its weight.
    """

    name: str
    """Qualified name of the parameter."""
    dim: int
    """Not negative."""
    segments: Ranges
    """Ranges of the dimension, each of them cut."""
    units: int
    """Divides the group's: key and value heads have fewer units than query heads. A rank holds every unit that it
    needs, so several ranks may hold the same."""
    span: Range | None = None
    """The units of the group that fall into it, if not all: one dimension may have several members."""


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Dimensions that are dealt out together."""

    kind: UnitKind
    units: int
    members: tuple[Member, ...]
    source: str
    """How it was found: `traced`, or `names`, which may be wrong."""

    @property
    def coarse(self) -> int:
        """How many things units share: key and value heads, or the units themselves."""
        return min((m.units for m in self.members if m.units > 1 and m.span is None), default=self.units)

    def pieces(self, ranks: int, quantum: int = 1) -> list[Range]:
        """Units of each rank, dealt by so many at once. Raises PlanError if some rank would have none."""
        return deal_grouped(self.units, self.coarse, ranks, self.kind, quantum)

    def most_ranks(self, quantum: int = 1) -> int:
        """How many ranks can have a part, if units are dealt by so many at once."""
        return most_ranks(self.units, self.coarse, quantum)


def deal(units: int, ranks: int) -> list[Range]:
    """Deal units to ranks in order, the first ranks getting one more where they do not divide."""
    share, more = divmod(units, ranks)
    ends = [share * (rank + 1) + min(rank + 1, more) for rank in range(ranks)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def deal_grouped(units: int, coarse: int, ranks: int, kind: str, quantum: int = 1) -> list[Range]:
    """Deal units of which `units / coarse` share something (query heads a key head), shared things whole if possible.

    With more ranks than shared things, each of these goes to several ranks, which divide its units among themselves.
    No rank has a part of one shared thing beside another.

    Args:
        units: how many.
        coarse: shared things, which divide them.
        ranks: to deal to.
        kind: of units, for the message.
        quantum: units between two places where a dimension may be cut. The last ones may be fewer.

    Raises: PlanError if some rank would have none.
    """
    if ranks > (most := most_ranks(units, coarse, quantum)):
        raise PlanError(f"{units} {kind} cannot be dealt to {ranks} ranks: at most {most} ranks have a part in them")
    size = units // coarse
    whole = lcm(size, quantum)
    if ranks <= -(-units // whole):
        return [(start * whole, min(stop * whole, units)) for start, stop in deal(-(-units // whole), ranks)]
    return [
        (shared * size + start * quantum, shared * size + stop * quantum)
        for shared, (first, last) in enumerate(deal(ranks, coarse))
        for start, stop in deal(size // quantum, last - first)
    ]


def most_ranks(units: int, coarse: int, quantum: int) -> int:
    """How many ranks can have a part of units that are dealt as in `deal_grouped`."""
    size = units // coarse
    return units // quantum if size % quantum == 0 else -(-units // lcm(size, quantum))


def ranges_of(member: Member, units: int, piece: Range) -> Ranges:
    """What a rank that is dealt units `piece` of a group's `units` holds of a member's dimension."""
    begin, end = member.span or (0, units)
    ratio = (end - begin) // member.units
    start, stop = max(piece[0], begin) - begin, min(piece[1], end) - begin
    if start >= stop:
        return ()
    first, last = start // ratio, -(-stop // ratio)
    ranges = []
    for low, high in member.segments:
        size = (high - low) // member.units
        ranges.append((low + first * size, low + last * size))
    return tuple(ranges)


def ranges_of_all(members: Sequence[Member], units: int, piece: Range) -> Ranges:
    """What such a rank holds of a dimension that has several members, in the order of its indices."""
    return tuple(sorted(r for member in members for r in ranges_of(member, units, piece)))

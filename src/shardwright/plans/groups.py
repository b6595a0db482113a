"""What must be cut together, and in which units.

A plan says which parameters are cut; the *unit group* says where. The heads of an attention, the hidden features of an
MLP, the rows of a vocabulary are dealt to ranks in whole units, and every parameter that has a part in a unit goes with
it: the rows of the query projection, the columns of the output projection. Units are dealt unevenly if they must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

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

    def pieces(self, ranks: int) -> list[Range]:
        """Units of each rank. Raises PlanError if there are fewer units than ranks."""
        shared = [m.units for m in self.members if m.units > 1 and m.span is None]
        return deal_grouped(self.units, min(shared, default=self.units), ranks, self.kind)


def deal(units: int, ranks: int) -> list[Range]:
    """Deal units to ranks in order, the first ranks getting one more where they do not divide."""
    share, more = divmod(units, ranks)
    ends = [share * (rank + 1) + min(rank + 1, more) for rank in range(ranks)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def deal_grouped(units: int, coarse: int, ranks: int, kind: str) -> list[Range]:
    """Deal units of which `units / coarse` share something (query heads a key head), shared things whole if possible.

    With more ranks than shared things, each of these goes to several ranks, which divide its units among themselves.

    Raises: PlanError if there are fewer units than ranks.
    """
    if ranks > units:
        raise PlanError(f"{units} {kind} cannot be dealt to {ranks} ranks: at most {units} ranks have a part in them")
    size = units // coarse
    if ranks <= coarse:
        return [(start * size, stop * size) for start, stop in deal(coarse, ranks)]
    return [
        (shared * size + start, shared * size + stop)
        for shared, (first, last) in enumerate(deal(ranks, coarse))
        for start, stop in deal(size, last - first)
    ]


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

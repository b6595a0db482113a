"""Groups with fewer units than there are ranks, or in fewer quantized groups: every rank holds all of them.
Of few units only if there are heads that can be dealt.

A model may have layers of few heads among layers of many, or an index with few heads beside its attention. That is no
reason to refuse so many ranks; where the heads of no layer can be dealt, it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from shardwright.plans.groups import Member, UnitGroup, UnitKind
from shardwright.plans.patterns import generalize
from shardwright.plans.quantities import size
from shardwright.plans.quantization import Quantization, most_ranks
from shardwright.plans.replicate import is_in
from shardwright.plans.styles import Cut, Output, Style
from shardwright.plans.table import ShardTable, Undealt


def too_few(groups: Collection[UnitGroup], ranks: int, quantization: Quantization | None = None) -> list[UnitGroup]:
    """Groups that cannot be dealt and need not be: those of few units only if there are heads that have enough.

    Args:
        groups: those that a plan cuts.
        ranks: to deal them to.
        quantization: of the model's weights, which are cut between quantized groups.
    """
    can_deal_heads = any(group.kind is UnitKind.HEADS and group.units >= ranks for group in groups)
    return [
        group
        for group in groups
        if (can_deal_heads or group.units >= ranks) and most_ranks(group, quantization) < ranks
    ]


def hold_whole(
    module: nn.Module,
    groups: Sequence[UnitGroup],
    styles: Mapping[str, Style],
    is_cut: Callable[[Member], bool],
    *,
    ranks: int,
    quantization: Quantization | None = None,
) -> tuple[Undealt, ...]:
    """What every rank holds all of, for it cannot be dealt, or is summed together with what cannot.

    Args:
        module: the model.
        groups: of it.
        styles: of the modules that the plan names.
        is_cut: whether the plan cuts a dimension of a parameter.
        ranks: to deal them to.
        quantization: of its weights.
    """
    cut = {group: [member.name for member in group.members if is_cut(member)] for group in groups}
    cut = {group: names for group, names in cut.items() if names}
    held: list[Undealt] = []
    for group in too_few(cut, ranks, quantization):
        modules: dict[str, None] = {}
        waiting = cut.pop(group, None)
        while waiting:
            modules |= dict.fromkeys(_place(module, name, styles) for name in waiting)
            drawn_in = next((g for g, names in cut.items() if any(is_in(name, modules) for name in names)), None)
            waiting = cut.pop(drawn_in) if drawn_in is not None else None
        if modules:
            group_size = None if quantization is None or group.units < ranks else quantization.format.group_size
            held.append(Undealt(group.kind, group.units, group_size, tuple(modules)))
    return tuple(held)


def _place(module: nn.Module, name: str, styles: Mapping[str, Style]) -> str:
    """What is whole if a parameter is: all that is summed with it, its linear, or the parameter alone."""
    levels = name.split(".")[:-1]
    for depth in range(1, len(levels) + 1):
        style = styles.get(around := ".".join(levels[:depth]))
        if style is not None and style.output is Output.SUMMED and style.cut is Cut.NONE:
            return around
    owner = ".".join(levels)
    return name if not owner or any(True for _ in module.get_submodule(owner).children()) else owner


def descriptions(table: ShardTable) -> Iterator[str]:
    """What a table does not deal, as sentences without their ends, layers that are alike in one."""
    alike: dict[tuple[str, ...], list[Undealt]] = defaultdict(list)
    for undealt in table.undealt:
        alike[named_units(undealt.kind, undealt.units, undealt.group_size), *map(generalize, undealt.modules)].append(
            undealt
        )
    for (units, *_), found in alike.items():
        first, places = found[0], {name for undealt in found for name in undealt.modules}
        total = sum(row.local_bytes(0) for row in table.parameters if is_in(row.name, places))
        yield (
            f"{units} cannot be dealt to {table.tp} ranks: every rank holds all of "
            f"{named(first.modules)}{more_layers(len(found))}, {size(total - total // table.tp)} more than its share"
        )


def named_units(kind: UnitKind, units: int, group_size: int | None) -> str:
    """What cannot be dealt."""
    if group_size is None:
        return f"{units} {kind}"
    return f"{kind} that lie in quantized groups of {group_size}"


def named(names: Sequence[str], most: int = 3) -> str:
    """The first of some modules by its qualified name, others by their last."""
    shown = [names[0], *(name.rpartition(".")[2] for name in names[1:most])]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def more_layers(count: int) -> str:
    """How many layers are like the first, behind the names of its modules."""
    return f" (and in {count - 1} more layers)" if count > 2 else " (and in 1 more layer)" if count == 2 else ""

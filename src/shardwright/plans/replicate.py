"""A table of which parts are taken back: every rank holds all of some modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from shardwright.plans.styles import REPLICATE
from shardwright.plans.table import ParameterRow, ShardTable


def without(table: ShardTable, modules: Collection[str]) -> ShardTable:
    """A table in which every rank holds all of some modules, by qualified name."""
    return replace(
        table,
        parameters=tuple(rows_without(table.parameters, modules)),
        modules={name: style for name, style in table.modules.items() if not is_in(name, modules)},
    )


def rows_without(rows: Iterable[ParameterRow], modules: Collection[str]) -> list[ParameterRow]:
    """Rows of a table in which every rank holds all of some modules."""
    return [
        replace(row, style=REPLICATE, dim=None, ranges=(), unit=1, once=False)
        if any(is_in(name, modules) for name in (row.name, *row.aliases))
        else row
        for row in rows
    ]


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether a module or parameter is one of some modules, or in one of them."""
    levels = name.split(".")
    return any(".".join(levels[:depth]) in modules for depth in range(1, len(levels) + 1))

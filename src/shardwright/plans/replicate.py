"""A table of which parts are taken back: every rank holds all of some modules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from shardwright.plans.styles import REPLICATE
from shardwright.plans.table import ShardTable


def without(table: ShardTable, modules: Collection[str]) -> ShardTable:
    """A table in which every rank holds all of some modules, by qualified name."""
    rows = tuple(
        replace(row, style=REPLICATE, dim=None, ranges=(), unit=1, once=False)
        if any(is_in(name, modules) for name in (row.name, *row.aliases))
        else row
        for row in table.parameters
    )
    return replace(
        table,
        parameters=rows,
        modules={name: style for name, style in table.modules.items() if not is_in(name, modules)},
    )


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether a module or parameter is one of some modules, or in one of them."""
    levels = name.split(".")
    return any(".".join(levels[:depth]) in modules for depth in range(1, len(levels) + 1))

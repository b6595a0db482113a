"""A report as a page: one HTML file that needs nothing else, for people who were not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from shardwright.errors import PlanError
from shardwright.plans.quantities import count, size
from shardwright.plans.report.report import EntryUse, PlanReport
from shardwright.plans.report.text import SOURCES, heading, modules_of, pieces
from shardwright.plans.styles import Cut, parse_style
from shardwright.plans.table import ParameterRow

TEMPLATE = "page.html"
WIDTH, HEIGHT = 120.0, 64.0
"""Of the drawing of a cut parameter, in pixels."""

MOST_RANKS_DRAWN = 16
"""In the drawing of one parameter; more are told in words."""


@dataclass(frozen=True, slots=True)
class Band:
    """A rectangle of a drawing: what one rank holds."""

    x: float
    y: float
    width: float
    height: float
    rank: int


def write_page(report: PlanReport, path: Path) -> None:
    """Write the page. Raises PlanError if the file cannot be written."""
    try:
        path.write_text(page(report), encoding="utf-8")
    except OSError as exc:
        raise PlanError(f"the report cannot be written to {path}: {exc.strerror}") from exc


def page(report: PlanReport) -> str:
    """The page as HTML."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": count, "size": size}
    template = environment.get_template(TEMPLATE)
    return template.render(
        report=report,
        heading=heading(report),
        sources=SOURCES,
        entries=[entry(use, report.tp) for use in report.uses()],
        uncovered=size(sum(row.local_bytes(0) for row in report.rows if row.matched_by is None)),
        stages=list(stages(report)),
        family=family,
    )


def entry(use: EntryUse, ranks: int) -> dict[str, Any]:
    """What the page says of one entry of the plan."""
    row = use.cut
    return {
        "pattern": use.pattern,
        "word": use.word,
        "family": family(use.word),
        "weights": len(use.rows),
        "shape": " x ".join(map(str, (row or use.rows[0]).shape)) if use.rows else "",
        "pieces": "" if row is None else f"dim {row.dim}: {pieces(row.pieces(ranks))}",
        "bands": [] if row is None or ranks > MOST_RANKS_DRAWN else bands(row),
    }


def family(word: str) -> str:
    """What a style does to a parameter, as a class of the page."""
    cut = parse_style(word, where="plan").cut
    if cut in (Cut.COLUMNS, Cut.PACKED_COLUMNS):
        return "column"
    if cut in (Cut.ROWS, Cut.PACKED_ROWS):
        return "row"
    return {Cut.VOCABULARY: "embedding", Cut.EMBEDDING: "embedding", Cut.EXPERTS: "experts"}.get(cut, "whole")


def bands(row: ParameterRow) -> list[Band]:
    """Where the parts of a parameter lie in a drawing of it: its first dimension downwards, its last to the right."""
    assert row.dim is not None
    length = row.shape[row.dim]
    down = row.dim < len(row.shape) - 1 or len(row.shape) == 1
    drawn = []
    for rank, ranges in enumerate(row.ranges):
        for start, stop in ranges:
            low, high = start / length, stop / length
            if down:
                drawn.append(Band(0, low * HEIGHT, WIDTH, (high - low) * HEIGHT, rank))
            else:
                drawn.append(Band(low * WIDTH, 0, (high - low) * WIDTH, HEIGHT, rank))
    return drawn


def stages(report: PlanReport) -> Iterator[dict[str, Any]]:
    """What the page says of each stage, its ranks with their memory among it."""
    memory = report.memory()
    most = max((rank["weight_bytes"] for rank in memory), default=1) or 1
    for stage in report.stages:
        ranks = []
        for rank in memory:
            if rank["stage"] == stage.index:
                parts = memory_parts(report, stage.index, rank["tp_rank"])
                shares = [(name, num_bytes, 100 * num_bytes / most) for name, num_bytes in parts.items() if num_bytes]
                ranks.append({"number": rank["rank"], "bytes": rank["weight_bytes"], "parts": shares})
        yield {"index": stage.index, "modules": modules_of(stage), "layers": len(stage.layers), "ranks": ranks}


def memory_parts(report: PlanReport, stage: int, tp_rank: int) -> dict[str, int]:
    """Bytes of a rank by how they are cut."""
    parts = dict.fromkeys(("column", "row", "experts", "embedding", "whole"), 0)
    for row in report.rows:
        if stage in row.stages:
            parts["whole" if row.dim is None else family(row.word)] += row.local_bytes(tp_rank)
    return parts

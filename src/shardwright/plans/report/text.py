"""A report on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardwright.plans.quantities import plural, size
from shardwright.plans.report.report import EntryUse, PlanReport
from shardwright.plans.table import Stage

SOURCES = {
    "model": "the model's code",
    "config": "the model's config",
    "file": "the file given",
    "argument": "the argument given",
    "inferred": "inferred, the model has none",
    "none": "there is none",
}
"""Where a part of a plan comes from."""


def heading(report: PlanReport) -> str:
    """What the report is about."""
    return (
        f"{report.model} on {plural(report.tp * report.pp, 'rank')}: tp {report.tp} "
        f"({SOURCES[report.plan.tp_source]}), pp {report.pp} ({SOURCES[report.plan.pp_source]})"
    )


def entry_rows(report: PlanReport) -> Iterator[tuple[str, ...]]:
    """Entries as rows of a table: pattern, style, parameters, shape, what is cut and how."""
    for use in report.uses():
        yield (use.pattern, use.word, str(len(use.rows)), *cut_of(use, report.tp))
    rest = [row for row in report.rows if row.matched_by is None]
    if rest:
        total = sum(row.local_bytes(0) for row in rest)
        yield ("(in no entry)", "replicate", str(len(rest)), "", f"{size(total)} on every rank")


def cut_of(use: EntryUse, ranks: int) -> tuple[str, str]:
    """Shape of what an entry cuts, and the pieces that ranks get."""
    row = use.cut
    if row is None:
        return ("x".join(map(str, use.rows[0].shape)) if use.rows else "", "whole" if use.rows else "")
    return "x".join(map(str, row.shape)), f"dim {row.dim}: {pieces(row.pieces(ranks))}"


def pieces(lengths: Sequence[int]) -> str:
    """`2 x 64` for equal pieces, else each of them."""
    if len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]}"
    return " + ".join(map(str, lengths))


def stage_rows(report: PlanReport) -> Iterator[tuple[str, ...]]:
    """Stages as rows of a table: number, modules, layers, bytes."""
    for stage in report.stages:
        rows = [row for row in report.rows if stage.index in row.stages]
        total = sum(row.whole_bytes for row in rows)
        yield (str(stage.index), modules_of(stage), str(len(stage.layers) or ""), size(total))


def modules_of(stage: Stage) -> str:
    """Names of what a stage runs, layers as one range."""
    layers = set(stage.layers)
    names: list[str] = []
    for name in stage.modules:
        if name not in layers:
            names.append(name)
        elif name == stage.layers[0]:
            last = stage.layers[-1].rpartition(".")[2]
            names.append(name if len(layers) == 1 else f"{name} to {last}")
    return ", ".join(names)


def memory_rows(report: PlanReport) -> Iterator[tuple[str, ...]]:
    """Ranks as rows of a table: number, stage, place within it, bytes of weights."""
    for rank in report.memory():
        yield (str(rank["rank"]), str(rank["stage"]), str(rank["tp_rank"]), size(rank["weight_bytes"]))

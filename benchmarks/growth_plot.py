"""The plot of `growth.py`: one panel for each part, measured beside the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MEASURED, BOUND, SECOND = "#1f6feb", "#8b949e", "#d1603d"


def draw(document: dict[str, Any], image: Path) -> None:
    """Write an SVG. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "growth"  # the same numbers give the same file
    panels = [(part, panel) for part, panel in PANELS.items() if document.get(part)]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (part, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_xscale("log")
        panel(axes, document[part])
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{Path(document['model']).name}, {document['dtype']}, {document['machine']['cpu']}", fontsize=10)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None})


def draw_requests(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Tokens per second over requests."""
    counts = [row["requests"] for row in rows]
    axes.plot(counts, [row["bound"] for row in rows], "--", color=BOUND, label="bound")
    axes.plot(counts, [row["tokens_per_s"] for row in rows], "o-", color=MEASURED, label="measured")
    axes.set(xlabel="requests at a time", ylabel="output tokens per second", ylim=(0, None))
    name_ticks(axes, counts, [str(count) for count in counts])


def draw_context(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A decode step's milliseconds, and a prompt token's, over the context."""
    lengths = [row["context"] for row in rows]
    axes.plot(lengths, [row["step_bound_s"] * 1e3 for row in rows], "--", color=BOUND, label="bound of a step")
    axes.plot(lengths, [row["step_s"] * 1e3 for row in rows], "o-", color=MEASURED, label="decode step")
    prompt_token_ms = [row["prefill_s"] * 1e3 / row["context"] for row in rows]
    axes.plot(lengths, prompt_token_ms, "s-", color=SECOND, label="one token of the prompt")
    axes.set(xlabel="tokens of context", ylabel="ms", ylim=(0, None))
    name_ticks(axes, lengths, [str(length) for length in lengths])


def draw_size(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Tokens per second of one request over parameters."""
    sizes = [row["parameters"] for row in rows]
    axes.plot(sizes, [row["bound"] for row in rows], "--", color=BOUND, label="bound")
    axes.plot(sizes, [row["tokens_per_s"] for row in rows], "o-", color=MEASURED, label="measured")
    axes.set(xlabel="parameters", ylabel="output tokens per second, one request", ylim=(0, None))
    name_ticks(axes, sizes, [row["size"] for row in rows])


def name_ticks(axes: Any, places: list[int], names: list[str]) -> None:
    """Label what was measured, rather than powers of ten."""
    from matplotlib.ticker import NullFormatter

    axes.set_xticks(places, names, fontsize="small")
    axes.xaxis.set_minor_formatter(NullFormatter())


PANELS = {"requests": draw_requests, "context": draw_context, "size": draw_size}

"""The plot of a comparison: a panel for each workload, a bar for each engine, the bound as a line.

    python benchmarks/peers_plot.py benchmarks/results/DATE-MODEL-DTYPE.json docs/images/peers.svg

Needs matplotlib: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import title

OURS, PEER, BOUND = "#1f6feb", "#9aa4b2", "#d1603d"
COLUMNS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw one document of `peers.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON document of peers.py --output")
    parser.add_argument("image", type=Path, help="the SVG file to write")
    args = parser.parse_args(arguments)
    try:
        draw(json.loads(args.results.read_text()), args.image)
    except ModuleNotFoundError as exc:
        raise SystemExit(f"error: {exc.name} is missing: pip install -r benchmarks/requirements.txt") from exc


def draw(document: dict[str, Any], image: Path) -> None:
    """Write an SVG. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "peers"  # the same numbers give the same file
    rows = document["workloads"]
    columns = min(COLUMNS, len(rows))
    height = -(-len(rows) // columns)
    num_engines = len(document["starts"])
    figure = Figure(figsize=(4.2 * columns, (0.9 + 0.32 * num_engines) * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=False):
        draw_workload(axes, row)
    for axes in panels[len(rows) :]:
        axes.remove()
    figure.suptitle(f"{Path(document['model']).name}, {document['dtype']}, {document['machine']['cpu']}", fontsize=10)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None})


def draw_workload(axes: Any, row: dict[str, Any]) -> None:
    """One bar for each engine, the first on top."""
    engines, speeds = list(row["tokens_per_s"]), list(row["tokens_per_s"].values())
    colours = [OURS if name.startswith("shardwright") else PEER for name in engines]
    bars = axes.barh([title(name) for name in engines], speeds, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.axvline(row["bound_tokens_per_s"], color=BOUND, linestyle="--", linewidth=1)
    axes.set_title(f"{row['name']}, {row['headline']} tokens/s (line: bound)", fontsize=9)
    axes.set_xlim(0, 1.15 * max(*speeds, row["bound_tokens_per_s"]))
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()

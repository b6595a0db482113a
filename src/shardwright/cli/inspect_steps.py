"""What `shardwright inspect` says of a model's steps: whether they are recorded, and what is computed together."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from shardwright.adapt.served_model import ServedModel
    from shardwright.worker.blueprint import Blueprint
    from shardwright.worker.step import StepModel

MOST_NAMED = 4
"""Products or runs of one line; the rest are counted."""


def look_at_steps(
    served: StepModel | ServedModel, blueprint: Blueprint, *, device: torch.device, backend: str
) -> dict[str, Any]:
    """What the steps of a captured model are like, attention computed by a back end on a device."""
    from shardwright.worker.together import describe_steps, not_recorded

    if device.type == "cuda":
        return not_recorded("recorded are those on CPUs; on a GPU decodes are captured as CUDA graphs")
    if backend not in ("", "native"):
        return not_recorded(
            f"steps are recorded for native kernels, and its attention is computed by those of {backend}"
        )
    return describe_steps(served, num_positions=blueprint.max_model_len, vocab_size=blueprint.vocab_size)


def show_steps(console: Console, steps: dict[str, Any]) -> None:
    """Print it for people."""
    if not steps["recorded"]:
        console.print(f"steps: run the model's own code: {steps['reason']}", markup=False, soft_wrap=True)
        return
    layer = steps["layer"]
    in_layer = f", of which a layer has {layer['operations']:,} in {layer['passes']:,}" if layer else ""
    by_torch = f"; {steps['by_torch']} are left to torch" if steps["by_torch"] else ""
    lines = [f"steps: recorded: {steps['step']['operations']:,} operations in {steps['step']['passes']:,} passes"]
    lines[0] += in_layer + by_torch
    products = Counter(_product(names) for names in steps["products"])
    if products:
        lines.append(f"  one product: {_listed(products)}")
    runs: Counter[str] = Counter()
    for run in steps["runs"]:
        runs[run["what"]] += run["count"]
    if runs:
        lines.append(f"  one pass: {_listed(runs)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _product(names: list[str]) -> str:
    """Modules whose products are one, the last part of their names but of the first, and no number of a layer."""
    first, *others = (re.sub(r"^.*\.\d+\.", "", name) or "a weight" for name in names)
    return ", ".join([first, *(name.rpartition(".")[2] for name in others)])


def _listed(counts: Counter[str]) -> str:
    """The most frequent ones, with how often each occurs."""
    named = [f"{what} ({count})" for what, count in counts.most_common(MOST_NAMED)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(MOST_NAMED))
    return "; ".join([*named, f"others ({rest})"] if rest else named)

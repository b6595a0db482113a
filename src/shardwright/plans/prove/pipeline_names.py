"""Does the pipeline part of a plan name what its stages hand over?

Stages find out by themselves what they hand over, so a plan that names too little runs all the same here; elsewhere it
would not.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from shardwright.plans.pipeline import Pipeline
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.table import ShardTable


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Arguments of layers that stages hand over, and that the plan does not name."""

    entry: str
    """Of the plan: the container of the layers."""
    arguments: tuple[str, ...]
    is_all: bool
    """Whether the plan names none of what is handed over."""
    fix: str
    """The entry as it should be."""


def unnamed_arguments(module: nn.Module, plan: ParallelPlan, table: ShardTable, pipeline: Pipeline) -> Unnamed | None:
    """What a plan's entry for the layers leaves out; None if it has no such entry, or names everything."""
    handed: list[str] = []
    for stage in table.stages[1:]:
        signature = list(inspect.signature(module.get_submodule(stage.layers[0]).forward).parameters)
        handed += [_argument(path, signature) for path in pipeline.handovers[stage.index].arguments]
    first = table.stages[0].layers[0]
    entry = next((name for name in plan.pp if first == name or first.startswith(f"{name}.")), None)
    if entry is None:
        return None
    said = plan.pp[entry]
    missing = tuple(name for name in dict.fromkeys(handed) if name not in said.inputs)
    if not missing:
        return None
    fix = f"{json.dumps(entry)}: {json.dumps([[*missing, *said.inputs], list(said.outputs)])}"
    return Unnamed(entry, missing, len(missing) == len(set(handed)), fix)


def _argument(path: Sequence[str | int], signature: Sequence[str]) -> str:
    """Name of the argument that a path into `(args, kwargs)` leads to."""
    kind, key = path[0], path[1]
    return signature[int(key)] if kind == 0 else str(key)

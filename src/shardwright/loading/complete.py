"""What is wrong with a checkpoint, by name: the same words for every kind of module."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from shardwright.errors import CheckpointError

NAMES_SHOWN = 6


def check_names(model: nn.Module, path: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise CheckpointError if a weight is missing or left over."""
    kind = type(model).__name__
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights that {kind} needs: {some(sorted(missing))}; "
            "is it the checkpoint of another model, or only a part of one?"
        )
    if unexpected:
        raise CheckpointError(
            f"{path} has {len(unexpected)} weights that {kind} has no place for: "
            f"{some(sorted(unexpected))}; do config and code belong to another model?"
        )


def check_filled(model: nn.Module, path: Path) -> None:
    """Raise CheckpointError if a parameter of the module is still on "meta"."""
    if left := [name for name, p in model.named_parameters() if p.device.type == "meta"]:
        raise CheckpointError(f"{path}: nothing was loaded into {some(left)}")


def check_shapes(path: Path, mismatched: Iterable[tuple[str, torch.Size, torch.Size]]) -> None:
    """Raise CheckpointError if there are mismatches, each given as name, shape found and shape wanted."""
    rows = [f"{name} is {_shape(found)}, expected {_shape(wanted)}" for name, found, wanted in mismatched]
    if rows:
        raise CheckpointError(f"weights of {path} do not fit the model: {some(rows)}")


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a number"

"""Names that training has changed: compiling, sharding and parallel wrappers put their own parts into them."""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any

logger = logging.getLogger(__name__)

INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of torch.compile, FSDP and activation checkpointing, which may wrap any module."""

IN_FRONT = ("module.", "model.")
"""Of data parallelism, and of trainers that hold the model as an attribute: in front of every name or of none."""


def unwrap_names(tensors: dict[str, Any], wanted: Set[str], *, where: object) -> dict[str, Any]:
    """The same tensors without the parts that wrappers added, as far as that makes more names those of the module.

    Args:
        tensors: of a checkpoint, by name.
        wanted: names in the module.
        where: the checkpoint, for the log.
    """
    candidates = [("", tensors)]
    removed = sorted({part for part in INSIDE for name in tensors if part in name})
    current = {_without(name, INSIDE): tensor for name, tensor in tensors.items()}
    while len(current) == len(tensors) > 0:
        candidates.append((" and ".join(map(repr, removed)), current))
        prefix = next((p for p in IN_FRONT if all(name.startswith(p) for name in current)), None)
        if prefix is None:
            break
        removed = [*removed, prefix]
        current = {name.removeprefix(prefix): tensor for name, tensor in current.items()}
    taken_away, best = max(candidates, key=lambda candidate: len(candidate[1].keys() & wanted))
    if taken_away:
        logger.info("%s: names of weights are read without %s", where, taken_away)
    return best


def _without(name: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        name = name.replace(part, "")
    return name

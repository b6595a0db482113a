"""Fill a plain nn.Module from tensors of the same names.

What is on "meta" is replaced, what the code made for real is written over. A tensor that the module holds under several
names has one place, and one of the names is enough.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shardwright.errors import CheckpointError
from shardwright.loading.complete import check_filled, check_names, check_shapes, some
from shardwright.loading.lazy import lazy
from shardwright.loading.part import take_part

if TYPE_CHECKING:
    from shardwright.plans.slices import ShardSlice

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Place:
    """Where a tensor of a checkpoint goes."""

    tensor: Tensor
    """The module's parameter or buffer."""
    names: list[str] = field(default_factory=list)
    """All that the module has for it."""


@torch.no_grad()
def fill_plain(module: nn.Module, tensors: dict[str, Any], path: Path, *, part: ShardSlice | None = None) -> None:
    """Load tensors into a module, each in the type that the module has for it.

    Buffers that the checkpoint lacks keep what the module's code put into them.

    Args:
        module: changed in place; cut, if `part` is given.
        tensors: of the checkpoint, by name.
        path: of the checkpoint, for what is said of it.
        part: what this rank holds of the module, the only thing that is read.

    Raises: CheckpointError naming weights that are missing, unexpected, of the wrong shape or contradictory.
    """
    places = find_places(module)
    names = {name for place in places for name in place.names}
    computed = {name for name, _ in module.named_buffers(remove_duplicate=False)} - names
    missing, kept, found = [], [], []
    for place in places:
        present = [name for name in place.names if name in tensors]
        if present:
            found.append((place, present))
        elif isinstance(place.tensor, nn.Parameter) or place.tensor.is_meta:
            missing.append(place.names[0])
        else:
            kept.append(place.names[0])
    unexpected = tensors.keys() - names - computed
    if missing and unexpected:
        raise CheckpointError(_other_names(module, path, missing, sorted(unexpected)))
    check_names(module, path, missing, unexpected)
    if kept:
        logger.warning("%s: not in the checkpoint, kept as the model's code computes them: %s", path, some(kept))
    mismatched = []
    for place, present in found:
        whole = lazy(tensors[present[0]])
        expected = place.tensor.shape if part is None else part.whole_shape(place.names[0]) or place.tensor.shape
        if whole.shape != expected:
            mismatched.append((present[0], whole.shape, torch.Size(expected)))
        elif (value := _read(tensors, present, path, place, part)) is not None:
            put(module, place, value)
    check_shapes(path, mismatched)
    check_filled(module, path)


def find_places(module: nn.Module) -> list[Place]:
    """Every parameter and every buffer that belongs into a checkpoint, once, with all its names."""
    saved = module.state_dict().keys()
    places: dict[int, Place] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), Place(parameter)).names.append(name)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name in saved:
            places.setdefault(id(buffer), Place(buffer)).names.append(name)
    return list(places.values())


def put(module: nn.Module, place: Place, value: Tensor) -> None:
    """Give a place its value, under all its names."""
    old = place.tensor
    if not old.is_meta:
        old.copy_(value)
        return
    value = value.to(old.dtype).contiguous()
    new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
    new.__dict__.update(old.__dict__)
    for name in place.names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new)


def _read(
    tensors: dict[str, Any], names: list[str], path: Path, place: Place, part: ShardSlice | None
) -> Tensor | None:
    """The value that a checkpoint has under one or several names of the same tensor; None if this rank needs none."""

    def value_of(name: str) -> Tensor | None:
        return lazy(tensors[name]).whole() if part is None else take_part(place.names[0], lazy(tensors[name]), part)

    value = value_of(names[0])
    for other in names[1:] if value is not None else ():
        again = value_of(other)
        if again is None or value is None or not torch.equal(value, again):
            raise CheckpointError(
                f"{path} has different values for {names[0]} and {other}, which are one tensor in the model's code"
            )
    return value


def _other_names(module: nn.Module, path: Path, missing: list[str], unexpected: list[str]) -> str:
    kind = type(module).__name__
    return (
        f"names in {path} are not those of {kind}: {len(missing)} are missing ({some(missing)}), "
        f"{len(unexpected)} have no place ({some(unexpected)}); rename them with --weight-map FILE, "
        "or load another model's checkpoint"
    )

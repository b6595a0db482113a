"""Tensors inside of what a module is given or returns: lists, tuples and mappings at any depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import PlanError

Path = tuple[str | int, ...]
"""Keys and places that lead to a tensor."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is known of a tensor that is not there."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def tensors_with_paths(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Tensors, and how to get to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_with_paths(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_with_paths(item, (*path, index))


def tensor_at(value: Any, path: Path) -> Tensor:
    """The tensor that a path leads to. Raises PlanError if there is none."""
    found = value
    try:
        for key in path:
            found = found[key]
    except (KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        where = ".".join(map(str, path[1:]))
        raise PlanError(f"its layer is given no {where!r}, which it was given when it was looked at")
    return found


def with_tensors(template: Any, value: Any, tensors: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """Put tensors where they belong.

    A tensor that is there already gets the other's memory, so that all who hold it see what it is now; mappings and
    lists are filled, and keep who they are.

    Args:
        template: what the value is like when nothing is missing.
        value: may lack the tensors, and what they are in.
        tensors: by path.
        path: of the value.

    Returns: the value, or what stands in its place.
    """
    if not any(p[: len(path)] == path for p in tensors):
        return value
    if path in tensors:
        if isinstance(value, Tensor):
            with torch._C.DisableTorchFunction():
                value.set_(tensors[path])  # type: ignore[call-overload]
            return value
        return tensors[path]
    if isinstance(template, Mapping):
        filled = value if isinstance(value, MutableMapping) else {}
        for key, item in template.items():
            part = with_tensors(item, filled.get(key), tensors, (*path, key))
            if part is not None:
                filled[key] = part
        return filled
    items = list(value) if isinstance(value, list | tuple) else []
    items += [None] * (len(template) - len(items))
    parts = [with_tensors(item, items[i], tensors, (*path, i)) for i, item in enumerate(template)]
    if isinstance(value, list):
        value[:] = parts
        return value
    return rebuilt(template, parts) if isinstance(template, tuple) else parts


def rebuilt(like: tuple[Any, ...], parts: list[Any]) -> tuple[Any, ...]:
    """A tuple of the same class."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)

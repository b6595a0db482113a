"""Ranks that share a model look at it as one program: all go on, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from shardwright.errors import UnsupportedModelError

T = TypeVar("T")


def agreed(look: Callable[[], T], agree: Callable[[bool], bool]) -> T:
    """What a look at a module shows, if all ranks that share it see through it.

    Args:
        look: at the module.
        agree: whether all of them say yes; each asks after the same forward passes.

    Raises: what the look raises; UnsupportedModelError if it fails on another rank.
    """
    problem: Exception | None = None
    result: T | None = None
    try:
        result = look()
    except Exception as exc:
        problem = exc
    if not agree(problem is None):
        raise problem or UnsupportedModelError("its code cannot be answered on another rank")
    return cast(T, result)

"""Looks at a module that several ranks take together, each at its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from shardwright.errors import UnsupportedModelError

T = TypeVar("T")


def agreed(look: Callable[[], T], agree: Callable[[bool], bool]) -> T:
    """What a look at the module shows, if all ranks that share it see through it: they go on together, or stop.

    Args:
        look: may run forward passes, the same ones on every rank.
        agree: whether all ranks say yes.

    Raises: UnsupportedModelError.
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

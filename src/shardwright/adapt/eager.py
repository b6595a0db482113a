"""Run the user's code as it is written, not as torch.compile would rewrite it.

Code that compiles parts of itself would stop to do so at every new shape, and its attention could not be watched.
flex_attention warns where it is not compiled; that is kept from users, who could do nothing about it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from shardwright.foreign_imports import compiler_off

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """While the function runs, torch.compile in whatever it calls does nothing."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        flex = sys.modules.get("torch.nn.attention.flex_attention")
        warned: set[str] = getattr(flex, "_WARNINGS_SHOWN", set())
        warned.add("flex_attention_performance")
        with compiler_off():
            return function(*args, **kwargs)

    return run

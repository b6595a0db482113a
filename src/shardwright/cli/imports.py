"""Imports that take seconds: torch, Transformers, and what these import."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without a search for garbage in between, which costs a fifth of the time and finds next to none.

    What was imported stays, so later searches need not go through it either.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()

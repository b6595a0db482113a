"""Patterns over qualified names: `*` stands for one level, whatever it is called."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache


@cache
def _levels(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module or parameter: level by level, `*` for any one level."""
    wanted, levels = _levels(pattern), _levels(name)
    return len(wanted) == len(levels) and all(w in ("*", level) for w, level in zip(wanted, levels, strict=True))


def specificity(pattern: str) -> tuple[int, int]:
    """Sorts patterns that match the same parameter: the one with more levels, then with fewer `*`, wins."""
    levels = _levels(pattern)
    return len(levels), -levels.count("*")


def generalize(name: str) -> str:
    """A name with its numbered levels as `*`: how plans are written."""
    return ".".join("*" if level.isdecimal() else level for level in _levels(name))


def nearest(pattern: str, names: Iterable[str]) -> str | None:
    """The real name, generalized, that looks most like a pattern; None if nothing does."""
    found = difflib.get_close_matches(pattern, sorted({generalize(name) for name in names}), n=1, cutoff=0.5)
    return found[0] if found else None

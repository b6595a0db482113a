"""Sizes that a module's code reads from its attributes and that are smaller on a rank: head counts, widths.

Parameters tell their own sizes, but code such as `x.view(batch, length, self.n_head, -1)` asks an attribute, its own or
one of its config. `plans.fit` finds out which of them have to change; here they are changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class LocalSize:
    """One attribute that is to say what this rank has."""

    module: str
    """Qualified name."""
    attribute: str
    """Its name, `config.n_head` if it is one of an object that the module holds."""
    values: tuple[Any, ...]
    """Per TP rank: an int, or a list or tuple of ints."""


class LocalView:
    """An object as a module sees it: some of its attributes or items are others, all else is the object's own.

    Args:
        original: an object that several modules share, such as a config.
    """

    def __init__(self, original: Any) -> None:
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_local", {})

    def __getattr__(self, name: str) -> Any:
        local = object.__getattribute__(self, "_local")
        return local[name] if name in local else getattr(object.__getattribute__(self, "_original"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __getitem__(self, name: Any) -> Any:
        local = object.__getattribute__(self, "_local")
        return local[name] if name in local else self._original[name]

    def __contains__(self, name: Any) -> bool:
        return name in self._original

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalView:
        copied = LocalView(self._original)
        self._copy_into(copied)
        return copied

    def _copy_into(self, other: LocalView) -> None:
        object.__getattribute__(other, "_local").update(object.__getattribute__(self, "_local"))


def apply_sizes(module: nn.Module, sizes: Iterable[LocalSize], rank: int) -> None:
    """Let attributes of a model say what a rank has, in place."""
    for size in sizes:
        owner = module.get_submodule(size.module)
        holder, _, name = size.attribute.rpartition(".")
        value = size.values[rank]
        if holder:
            setattr(owner, holder, view_with(getattr(owner, holder), **{name: value}))
        else:
            setattr(owner, name, value)


def view_with(original: Any, **local: Any) -> LocalView:
    """An object, or a view of one, as seen by one more module for which some attributes or items are others."""
    view = LocalView(original)
    object.__getattribute__(view, "_local").update(local)
    return view

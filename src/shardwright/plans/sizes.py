"""Sizes that a module's code reads and that are smaller on a rank: head counts, widths.

Parameters tell their own sizes, but code such as `x.view(batch, length, self.n_head, -1)` asks an attribute, its own or
one of its config, or the shape of its input. `plans.fit` finds out which of them have to change; here they are changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel import become
from shardwright.layers.parallel_views import KnownViews, LocalViews
from shardwright.layers.parallel_width import LocalWidthInput


@dataclass(frozen=True, slots=True)
class LocalSize:
    """One attribute that is to say what this rank has."""

    module: str
    """Qualified name."""
    attribute: str
    """Its name, `config.n_head` if it is one of an object that the module holds."""
    values: tuple[Any, ...]
    """Per TP rank: an int, or a list or tuple of ints."""

    def apply(self, owner: nn.Module, collectives: Collectives) -> None:
        """Let the module say it, in place."""
        holder, _, name = self.attribute.rpartition(".")
        value = self.values[collectives.rank]
        if holder:
            setattr(owner, holder, view_with(getattr(owner, holder), **{name: value}))
        else:
            setattr(owner, name, value)


@dataclass(frozen=True, slots=True)
class LocalWidth:
    """The width of a module's input is to say what this rank has of its output."""

    module: str
    """Qualified name."""
    whole: int
    """Last dimension of the input."""
    values: tuple[int, ...]
    """Per TP rank: what its code is told."""

    def apply(self, owner: nn.Module, collectives: Collectives) -> None:
        """Let the module be told so, in place."""
        told = {"whole_width": self.whole, "local_width": self.values[collectives.rank]}
        become(owner, LocalWidthInput, collectives=collectives, **told)


@dataclass(frozen=True, slots=True)
class LocalViewSizes:
    """Views in sizes of the whole are to be made in those of this rank, in known places of a module's code."""

    module: str
    """Qualified name."""
    values: tuple[KnownViews, ...]
    """Per TP rank."""

    def apply(self, owner: nn.Module, collectives: Collectives) -> None:
        """Let the module's views be made so, in place."""
        become(owner, LocalViews, collectives=collectives, known_views=self.values[collectives.rank])


Local = LocalSize | LocalWidth | LocalViewSizes
"""Whatever a module's code is to take for the size of the whole."""


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


def view_with(original: Any, **local: Any) -> LocalView:
    """An object, or a view of one, as seen by one more module for which some attributes or items are others."""
    view = LocalView(original)
    object.__getattribute__(view, "_local").update(local)
    return view

"""What code keeps from call to call is put back, wherever it keeps it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.remembered import Remembered

BY_LENGTH: dict[int, Tensor] = {}
LAST: Tensor | None = None


@functools.cache
def behind_a_cache(length: int) -> Tensor:
    return torch.arange(length)


class Helper:
    """Is no module."""

    def __init__(self) -> None:
        self.cos: Tensor | None = None


class Keeper(nn.Module):
    """Returns what it made, or what it has kept of it."""

    kept_by_class: Tensor | None = None
    kept_in_list: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()
        self.attribute: Tensor | None = None
        self.tables: dict[int, Tensor] = {}
        self.register_buffer("buffer", None)

    def in_attribute(self, new: Tensor) -> Tensor:
        self.attribute = new if self.attribute is None else self.attribute
        return self.attribute

    def in_new_attribute(self, new: Tensor) -> Tensor:
        if not hasattr(self, "made"):
            self.made = new
        return self.made

    def in_buffer(self, new: Tensor) -> Tensor:
        if self.buffer is None:
            self.register_buffer("buffer", new)
        return self.buffer

    def in_dict(self, new: Tensor) -> Tensor:
        return self.tables.setdefault(len(new), new)

    def in_helper(self, new: Tensor) -> Tensor:
        self.helper.cos = new if self.helper.cos is None else self.helper.cos
        return self.helper.cos

    def in_class(self, new: Tensor) -> Tensor:
        if Keeper.kept_by_class is None:
            Keeper.kept_by_class = new
        return Keeper.kept_by_class

    def in_list_of_class(self, new: Tensor) -> Tensor:
        if not self.kept_in_list:
            self.kept_in_list.append(new)
        return self.kept_in_list[0]

    def in_global(self, new: Tensor) -> Tensor:
        global LAST
        LAST = new if LAST is None else LAST
        return LAST

    def in_global_dict(self, new: Tensor) -> Tensor:
        return BY_LENGTH.setdefault(len(new), new)

    def in_default(self, new: Tensor, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006 - authors do
        return kept.setdefault(len(new), new)

    def in_cache(self, new: Tensor) -> Tensor:
        return behind_a_cache(len(new))


WAYS = [getattr(Keeper, name) for name in dir(Keeper) if name.startswith("in_")]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("only_changed", [False, True])
def test_it_is_put_back(way: Callable[[Keeper, Tensor], Tensor], only_changed: bool) -> None:
    module = Keeper()
    fresh = Remembered(nn.Sequential(module))
    first = way(module, torch.zeros(3))
    assert way(module, torch.ones(3)) is first
    if only_changed:
        fresh.only_changed()
    fresh.restore()
    second = way(module, torch.ones(3))
    assert second is not first
    fresh.restore()
    assert way(module, torch.ones(3)) is not second
    fresh.restore()


def test_what_did_not_change_is_left_alone() -> None:
    module = Keeper()
    fresh = Remembered(module)
    module.in_attribute(torch.zeros(3))
    fresh.only_changed()
    module.note = "of somebody else"
    fresh.restore()
    assert module.attribute is None
    assert module.note == "of somebody else"

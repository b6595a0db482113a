"""Views of this rank's part by code that says the sizes of the whole.

In a layer that holds its attention and its residual stream alike, a width is sometimes that of the whole and sometimes
that of a part:

    B, T, C = x.size()
    q = self.query(self.norm(x)).view(B, T, self.n_head, C // self.n_head)
    x = x + self.out(attention.transpose(1, 2).reshape(B, T, C))

No attribute can be right for both. But where in the code a tensor is viewed in sizes that it does not have is soon
seen, and there the sizes that are cut are replaced by this rank's.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwright.layers.parallel_module import Parallel

Place = tuple[str, int]
"""A file and a line of the model's code."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the whole that code views a tensor in, and this rank's."""

    positions: tuple[int, ...]
    whole: tuple[int, ...]
    local: tuple[int, ...]

    def applied(self, asked: Sequence[int]) -> tuple[int, ...] | None:
        """Sizes of the part for those that code asks for, which may be multiples; None if these are others."""
        sizes = list(asked)
        for position, whole, local in zip(self.positions, self.whole, self.local, strict=True):
            if position >= len(sizes) or sizes[position] % whole:
                return None
            sizes[position] = sizes[position] // whole * local
        return tuple(sizes)


@dataclass(slots=True)
class KnownViews:
    """Where a module's code views parts in sizes of the whole."""

    at: dict[Place, list[Sizes]] = field(default_factory=dict)


@dataclass(slots=True)
class LearnedViews(KnownViews):
    """Finds such places while the code runs for the first time."""

    candidates: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """What a size of the whole may be on this rank."""
    preferred: Mapping[Place, int] = field(default_factory=dict)
    """Which of several ways to make sizes fit is taken; elsewhere the first."""
    ways: dict[Place, int] = field(default_factory=dict)
    """How many there are."""

    def learn(self, place: Place, asked: Sequence[int], given: Sequence[int], fits: Callable[..., bool]) -> None:
        """Find sizes that fit a tensor of a certain shape, if there are any."""
        kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, given, strict=False)))
        found = list(self._fitting(asked, kept, fits))
        if found:
            self.ways[place] = max(len(found), self.ways.get(place, 0))
            self.at.setdefault(place, []).append(found[min(self.preferred.get(place, 0), len(found) - 1)])

    def _fitting(self, asked: Sequence[int], kept: int, fits: Callable[..., bool]) -> Iterator[Sizes]:
        free = [position for position in range(kept, len(asked)) if asked[position] in self.candidates]
        for count in range(1, len(free) + 1):
            for positions in itertools.combinations(free, count):
                whole = tuple(asked[position] for position in positions)
                for local in itertools.product(*(self.candidates[size] for size in whole)):
                    sizes = Sizes(positions, whole, local)
                    if fits(sizes.applied(asked)):
                        yield sizes


class LocalViews(Parallel):
    """A module whose code is helped to view this rank's part in its own sizes."""

    known_views: KnownViews

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        with _Mended(self.known_views):
            return super().forward(*args, **kwargs)


class _Mended(TorchFunctionMode):
    """Replaces the sizes of views that do not fit, in known places."""

    def __init__(self, known: KnownViews) -> None:
        super().__init__()
        self._known = known

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _VIEWS and not kwargs:
            args = self._viewed(args, sys._getframe(1))
        elif func in _SPLITS:
            args = self._split(args, kwargs or {}, sys._getframe(1))
        return func(*args, **kwargs or {})

    def _viewed(self, args: tuple[Any, ...], frame: FrameType) -> tuple[Any, ...]:
        tensor, asked = args[0], args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        if not all(isinstance(size, int) for size in asked):
            return args
        count = tensor.numel()

        def fits(sizes: Sequence[int]) -> bool:
            known = math.prod(size for size in sizes if size != -1)
            return count == known if -1 not in sizes else known > 0 and count % known == 0

        sizes = self._mended(frame, asked, tensor.shape, fits)
        return args if sizes is None else (tensor, sizes)

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], frame: FrameType) -> tuple[Any, ...]:
        if len(args) < 2 or not isinstance(args[1], tuple | list):
            return args
        tensor, asked = args[:2]
        length = tensor.shape[args[2] if len(args) > 2 else kwargs.get("dim", 0)]
        sizes = self._mended(frame, asked, (), lambda sizes: sum(sizes) == length)
        return args if sizes is None else (tensor, list(sizes), *args[2:])

    def _mended(
        self, frame: FrameType, asked: Sequence[int], given: Sequence[int], fits: Callable[..., bool]
    ) -> tuple[int, ...] | None:
        place = frame.f_code.co_filename, frame.f_lineno
        if fits(asked) and not (-1 in asked and place in self._known.at):  # what -1 stands for may fit by accident
            return None
        if isinstance(self._known, LearnedViews) and not self._from(place, asked, fits):
            self._known.learn(place, asked, given, fits)
        return self._from(place, asked, fits)

    def _from(self, place: Place, asked: Sequence[int], fits: Callable[..., bool]) -> tuple[int, ...] | None:
        applied = (sizes.applied(asked) for sizes in self._known.at.get(place, ()))
        return next((sizes for sizes in applied if sizes is not None and fits(sizes)), None)


_VIEWS: set[Callable[..., Any]] = {Tensor.view, Tensor.reshape, torch.reshape}
_SPLITS: set[Callable[..., Any]] = {Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes}

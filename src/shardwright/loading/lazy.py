"""Tensors of a checkpoint that are read when a part of them is asked for, and only that part.

Between a file and a parameter stand renamings and conversions: experts stacked, projections joined or taken apart,
dimensions swapped. Here these are written down instead of carried out, and a part of the result is traced back to parts
of what is stored. Any other operation reads all that it needs and is carried out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shardwright.loading.weight_map import Merged

Box = tuple[tuple[int, int], ...]
"""Of each dimension, the first index and the one after the last."""


class LazyTensor(ABC):
    """A tensor that is not there yet. Code that handles weights takes it for one."""

    shape: torch.Size

    @abstractmethod
    def read(self, box: Box) -> Tensor:
        """A part of it, which may share memory with the checkpoint."""

    def whole(self) -> Tensor:
        """All of it."""
        return self.read(tuple((0, size) for size in self.shape))

    def part(self, dim: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Ranges of one dimension, one after another."""
        parts = []
        for part in ranges:
            box = [(0, size) for size in self.shape]
            box[dim] = part
            parts.append(self.read(tuple(box)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    # What follows is the part of torch.Tensor that can be written down.

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.read(((0, 0),) * self.ndim).is_floating_point()

    def to(self, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> LazyTensor:
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), dtype)
        return self if dtype is None else _Cast(self, dtype)

    def contiguous(self) -> LazyTensor:
        return self

    def detach(self) -> LazyTensor:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> LazyTensor:
        return self

    def transpose(self, dim0: int, dim1: int) -> LazyTensor:
        return _Transposed(self, dim0 % self.ndim, dim1 % self.ndim)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LazyTensor, ...]:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[LazyTensor, ...]:
        dim %= self.ndim
        length = self.shape[dim]
        if isinstance(split_size, int):
            split_size = [min(split_size, length - start) for start in range(0, length, split_size)]
        starts = [sum(split_size[:number]) for number in range(len(split_size))]
        return tuple(_Narrowed(self, dim, start, size) for start, size in zip(starts, split_size, strict=True))

    def reshape(self, *shape: Any) -> LazyTensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        whole = self.whole
        return _Computed(
            torch.empty(tuple(self.shape), device="meta").reshape(sizes).shape, lambda: whole().reshape(sizes)
        )

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WRITTEN_DOWN:
            return _WRITTEN_DOWN[func](*args, **kwargs)
        args, kwargs = tree_map(lambda value: value.whole() if isinstance(value, LazyTensor) else value, (args, kwargs))
        return func(*args, **kwargs)


class _Stored(LazyTensor):
    """A tensor in memory or in a mapped file, or an object that reads slices of one from there."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.shape = torch.Size(stored.shape if isinstance(stored, Tensor) else stored.get_shape())

    def read(self, box: Box) -> Tensor:
        is_whole = all(part == (0, size) for part, size in zip(box, self.shape, strict=True))
        part: Tensor = self._stored[... if is_whole else tuple(slice(start, stop) for start, stop in box)]
        return part


class _Cast(LazyTensor):
    def __init__(self, source: LazyTensor, dtype: torch.dtype) -> None:
        self._source, self._dtype, self.shape = source, dtype, source.shape

    def read(self, box: Box) -> Tensor:
        return self._source.read(box).to(self._dtype)

    def is_floating_point(self) -> bool:
        return self._dtype.is_floating_point


class _Joined(LazyTensor):
    """Tensors one after another along a dimension."""

    def __init__(self, sources: Sequence[LazyTensor], dim: int = 0) -> None:
        self._sources, self._dim = list(sources), dim % sources[0].ndim
        shapes = [list(source.shape) for source in sources]
        others = {tuple(shape[: self._dim] + shape[self._dim + 1 :]) for shape in shapes}
        if len(others) > 1:
            raise RuntimeError(f"tensors of {', '.join(map(str, shapes))} cannot be joined along dimension {dim}")
        shapes[0][self._dim] = sum(shape[self._dim] for shape in shapes)
        self.shape = torch.Size(shapes[0])

    def read(self, box: Box) -> Tensor:
        start, stop = box[self._dim]
        parts: list[Tensor] = []
        before = 0
        for source in self._sources:
            size = source.shape[self._dim]
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last or (not parts and source is self._sources[-1]):
                parts.append(source.read((*box[: self._dim], (first, max(first, last)), *box[self._dim + 1 :])))
            before += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, self._dim)


class _Stacked(LazyTensor):
    """Tensors of one shape along a new dimension."""

    def __init__(self, sources: Sequence[LazyTensor], dim: int = 0) -> None:
        shape = list(sources[0].shape)
        if any(list(source.shape) != shape for source in sources):
            raise RuntimeError(f"tensors of {', '.join(str(list(s.shape)) for s in sources)} cannot be stacked")
        self._sources, self._dim = list(sources), dim % (len(shape) + 1)
        self.shape = torch.Size([*shape[: self._dim], len(sources), *shape[self._dim :]])

    def read(self, box: Box) -> Tensor:
        inner = (*box[: self._dim], *box[self._dim + 1 :])
        start, stop = box[self._dim]
        parts = [source.read(inner) for source in self._sources[start:stop] or self._sources[:1]]
        return torch.stack(parts, self._dim).narrow(self._dim, 0, stop - start)


class _Narrowed(LazyTensor):
    """A range of one dimension."""

    def __init__(self, source: LazyTensor, dim: int, start: int, length: int) -> None:
        self._source, self._dim, self._start = source, dim, start
        self.shape = torch.Size([*source.shape[:dim], length, *source.shape[dim + 1 :]])

    def read(self, box: Box) -> Tensor:
        first, last = (self._start + index for index in box[self._dim])
        return self._source.read((*box[: self._dim], (first, last), *box[self._dim + 1 :]))


class _Transposed(LazyTensor):
    def __init__(self, source: LazyTensor, dim0: int, dim1: int) -> None:
        self._source, self._dims = source, (dim0, dim1)
        self.shape = torch.Size(self._swapped(tuple(source.shape)))

    def read(self, box: Box) -> Tensor:
        return self._source.read(tuple(self._swapped(box))).transpose(*self._dims)

    def _swapped(self, items: tuple[Any, ...]) -> list[Any]:
        swapped = list(items)
        first, second = self._dims
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return swapped


class _Computed(LazyTensor):
    """The result of an operation of which no part can be traced back."""

    def __init__(self, shape: torch.Size, compute: Callable[[], Tensor]) -> None:
        self.shape, self._compute = shape, compute

    def read(self, box: Box) -> Tensor:
        return self._result[tuple(slice(start, stop) for start, stop in box)]

    @cached_property
    def _result(self) -> Tensor:
        return self._compute()


def lazy(stored: Any) -> LazyTensor:
    """A tensor of a checkpoint, as `loading.checkpoint.open_checkpoint` gives it.

    Raises: CheckpointError if it is to be joined of pieces that do not fit.
    """
    if not isinstance(stored, Merged):
        return _Stored(stored)
    pieces = [lazy(piece) for piece in stored.pieces]
    try:
        return _Joined(pieces, stored.dim)
    except (RuntimeError, IndexError, ZeroDivisionError) as exc:
        raise stored.misfit([tuple(piece.shape) for piece in pieces]) from exc


_WRITTEN_DOWN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.cat: _Joined,
    torch.stack: _Stacked,
    torch.transpose: LazyTensor.transpose,
    torch.chunk: LazyTensor.chunk,
    torch.split: LazyTensor.split,
}

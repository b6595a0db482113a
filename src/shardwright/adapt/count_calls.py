"""The calls of a forward pass that may count its tokens, told apart by their order.

A call of `torch.arange` from 0, a running sum of ones, or a slice of the first rows of a table, by an index or by
`narrow`, counts as many tokens as it is long. Which of
them count the tokens of a pass shows when it is traced (adapt/counting.py); while the model serves, they are known by
their places among the calls of their kind, which are the same (adapt/count_answers.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shardwright.adapt.remembered import global_tensors

_RUNNING_SUMS = {torch.cumsum, torch.Tensor.cumsum}
_NARROWS = {torch.narrow, torch.Tensor.narrow}


class Count(NamedTuple):
    """Which call it is."""

    table: int | str | None
    """Id of the table that it slices; "cumsum" for a running sum; None for a call of torch.arange."""
    place: int
    """Among slices of this table, or among calls of this kind."""


@dataclass(frozen=True, slots=True)
class TableSlice:
    """A slice of the leading rows of a tensor: `table[:n]`, `table[:, :n]`, `table[..., :n, :]`."""

    dim: int
    """Of the tensor."""
    entry: int
    """Of the index."""
    index: tuple[Any, ...]

    @property
    def stop(self) -> int:
        stop: int = self.index[self.entry].stop
        return stop

    def without_stop(self) -> tuple[Any, ...]:
        """The index without this slice."""
        return (*self.index[: self.entry], slice(None), *self.index[self.entry + 1 :])


@dataclass(frozen=True, slots=True)
class CountCall:
    """One call, as it is being made."""

    count: Count
    length: int | None
    """How many it counts; None for a call that does not count from the first on, one by one."""
    table: Tensor | None = None
    part: TableSlice | None = None
    """Of the table."""


class CountCalls:
    """Numbers the calls of one forward pass after another.

    Args:
        tables: whose slices are numbered too, but of those that the pass has written into: these are no tables.
    """

    def __init__(self, tables: Iterable[Tensor] = ()) -> None:
        self._tables = {id(table): table for table in tables}
        self.restart()

    def restart(self) -> None:
        """Begin to count a forward pass."""
        self._num_seen: dict[int | str | None, int] = {}
        self._written: set[int] = set()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CountCall | None:
        """Number a call, if it is of a kind that counts tokens."""
        if func is torch.arange:
            return CountCall(self._next(None), counted(args, kwargs))
        if func in _RUNNING_SUMS:
            return CountCall(self._next("cumsum"), num_summed(args, kwargs))
        if func in _NARROWS:
            func, args = torch.Tensor.__getitem__, (args[0], _narrowed(*args, **kwargs))
        if func is torch.Tensor.__setitem__:
            self._written.add(id(args[0]))
        is_table = func is torch.Tensor.__getitem__ and id(args[0]) in self._tables
        if not is_table or id(args[0]) in self._written:
            return None
        part = leading_slice(*args)
        return None if part is None else CountCall(self._next(id(args[0])), part.stop, args[0], part)

    def _next(self, table: int | str | None) -> Count:
        place = self._num_seen[table] = self._num_seen.get(table, -1) + 1
        return Count(table, place)


def counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many a call of torch.arange counts from 0, one by one, with these arguments; None if it does not."""
    names = ("end",) if len(args) == 1 and "end" not in kwargs else ("start", "end", "step")
    bounds = {"start": 0, "step": 1} | kwargs | dict(zip(names, args, strict=False))
    end = bounds.get("end")
    if bounds["start"] != 0 or bounds["step"] != 1 or not isinstance(end, (int, float, Tensor)):
        return None
    if isinstance(end, Tensor) and end.device.type == "meta":
        return None
    return int(end) if end == int(end) else None


def num_summed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many ones a call of torch.cumsum with these arguments adds up in a row; None if they are not all ones, or
    there are several rows of more than one.
    """
    values = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(values, Tensor) or not isinstance(dim, int) or values.device.type == "meta" or not values.ndim:
        return None
    length = values.shape[dim]
    return length if length in (1, values.numel()) and bool((values == 1).all()) else None


def _narrowed(table: Tensor, dim: int, start: Any, length: int) -> tuple[slice, ...]:
    """The index that gives what `narrow` gives with these arguments."""
    return (*[slice(None)] * (dim % table.ndim), slice(start, start + length))


def dtype_of_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """The type of what a call of torch.arange gives."""
    if (dtype := kwargs.get("dtype")) is not None:
        return dtype  # type: ignore[no-any-return]
    bounds = [*args, *(kwargs.get(name) for name in ("start", "end", "step"))]
    is_float = any(b.is_floating_point() if isinstance(b, Tensor) else isinstance(b, float) for b in bounds)
    return torch.get_default_dtype() if is_float else torch.int64


def leading_slice(table: Tensor, index: Any) -> TableSlice | None:
    """The slice of leading rows that an index asks for, on whatever dimension; None if there is none, or more than one,
    as there is in masks.
    """
    index = index if isinstance(index, tuple) else (index,)
    if not all(entry is None or entry is Ellipsis or isinstance(entry, (slice, int)) for entry in index):
        return None
    num_dims = sum(entry is not None and entry is not Ellipsis for entry in index)
    found, dim = [], 0
    for i, entry in enumerate(index):
        if entry is Ellipsis:
            dim += table.ndim - num_dims
        elif entry is not None:
            if isinstance(entry, slice) and isinstance(entry.stop, int) and not entry.start and not entry.step:
                found.append(TableSlice(dim, i, index))
            dim += 1
    return found[0] if len(found) == 1 else None


def tables_of(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that a model keeps from call to call: parameters, buffers, plain attributes, and globals of its code."""
    for module in model.modules():
        for owner in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in owner.values() if isinstance(value, Tensor))
    yield from global_tensors(model)

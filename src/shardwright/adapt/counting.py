"""What a module's code does with its counts of tokens.

`torch.arange(T)`, and the first T rows of a table, mostly stand for the positions of the one sequence that the code
takes its tokens for. But code also picks rows out of such a slice by position_ids, or counts tokens to find them in
something that is as long as the prompt. So every count is followed, while the module is traced, to where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GATHERS = {
    torch.gather: (0, 2), torch.Tensor.gather: (0, 2), torch.index_select: (0, 2), torch.Tensor.index_select: (0, 2),
    F.embedding: (1, 0), torch.Tensor.__getitem__: (0, 1), torch.Tensor.__setitem__: (0, 1),
}  # fmt: skip
"""Functions that reach into a tensor by index, and the places of both among their arguments."""


class Use(Enum):
    """What a count of tokens is, by what becomes of it."""

    POSITIONS = "positions"
    """It meets the tokens as it is: position i for token i."""
    WHOLE = "whole"
    """Rows are picked out of it by positions: it must reach as far as they do."""
    PLACES = "places"
    """It picks out of something as long as the prompt: place i for token i, wherever that token stands."""


class Count(NamedTuple):
    """One call that counts tokens."""

    table: int | None
    """Id of the table that it slices; None for a call of torch.arange."""
    place: int
    """Among slices of this table, or among calls of torch.arange."""


class CountFollower:
    """Follows counts through a forward pass, to where they meet the tokens or are used as an index.

    Args:
        num_tokens: of the pass; what is as long as this is taken to hold a number for each token.
    """

    def __init__(self, num_tokens: int) -> None:
        self.uses: dict[Count, Use] = {}
        self._num_tokens = num_tokens
        self._followed: dict[
            int, tuple[Tensor, frozenset[Count]]
        ] = {}  # tensors are held, so that their ids are theirs

    def begin(self, count: Count, result: Tensor) -> None:
        """Follow what a call gave."""
        self.uses[count] = Use.POSITIONS
        self._follow(result, frozenset([count]))

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """See a call that was made, and what it gave."""
        tensors = list(tensors_in((args, kwargs)))
        counts = frozenset[Count]().union(*(self._counts(tensor) for tensor in tensors))
        if not counts:
            return
        if func in _GATHERS and len(args) > max(_GATHERS[func]):
            source, index = (args[i] for i in _GATHERS[func])
            indices = [tensor for tensor in tensors_in(index) if tensor.dtype in (torch.int64, torch.int32)]
            if indices:
                self._note_gather(source, indices)
                return
        if not any(self._num_tokens in tensor.shape for tensor in tensors if not self._counts(tensor)):
            for tensor in tensors_in(result):
                self._follow(tensor, counts)

    def _note_gather(self, source: Tensor, indices: list[Tensor]) -> None:
        if picked_from := self._counts(source):
            self.uses.update(dict.fromkeys(picked_from, Use.WHOLE))
        elif self._num_tokens in source.shape:
            for index in indices:
                self.uses.update(dict.fromkeys(self._counts(index), Use.PLACES))

    def _counts(self, tensor: Tensor) -> frozenset[Count]:
        _, counts = self._followed.get(id(tensor), (None, frozenset[Count]()))
        return counts

    def _follow(self, tensor: Tensor, counts: frozenset[Count]) -> None:
        self._followed[id(tensor)] = (tensor, counts)


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
    """Tensors that a model keeps from call to call: parameters, buffers, and plain attributes."""
    for module in model.modules():
        for owner in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in owner.values() if isinstance(value, Tensor))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in arguments or results of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)

"""What a module's code does with its counts of tokens.

`torch.arange(T)`, and the first T rows of a table, mostly stand for the positions of the one sequence that the code
takes its tokens for. But code also picks rows out of such a slice by position_ids, or counts tokens to find them in
something that is as long as the prompt. So every count is followed, while the module is traced, to where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwright.adapt.count_calls import Count, CountCalls

_GATHERS = {
    torch.gather: (0, 2), torch.Tensor.gather: (0, 2), torch.index_select: (0, 2), torch.Tensor.index_select: (0, 2),
    F.embedding: (1, 0), torch.Tensor.__getitem__: (0, 1), torch.Tensor.__setitem__: (0, 1),
}  # fmt: skip
"""Functions that reach into a tensor by index, and the places of both among their arguments."""


COUNTS_ONCE = "its code counts tokens once, and remembers it for prompts of the same length"


class Use(Enum):
    """What a count of tokens is, by what becomes of it."""

    POSITIONS = "positions"
    """It meets the tokens as it is: position i for token i."""
    WHOLE = "whole"
    """Rows are picked out of it by positions: it must reach as far as they do."""
    PLACES = "places"
    """It picks out of something as long as the prompt: place i for token i, wherever that token stands."""


class CountFollower:
    """Follows counts through a forward pass, to where they meet the tokens or are used as an index.

    Args:
        calls: numbers the calls that may count.
        num_tokens: of the pass; what is as long as this is taken to hold a number for each token.
    """

    def __init__(self, calls: CountCalls, num_tokens: int) -> None:
        self.uses: dict[Count, Use] = {}
        self.num_rows: int | None = None
        """Fewest rows of the tables that counts are slices of."""
        self._calls = calls
        self._num_tokens = num_tokens
        self._followed: dict[
            int, tuple[Tensor, frozenset[Count]]
        ] = {}  # tensors are held, so that their ids are theirs

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """See a call that was made, and what it gave."""
        self._follow_uses(func, args, kwargs, result)
        call = self._calls.see(func, args, kwargs)
        if call is None or call.length != self._num_tokens:
            return
        if call.table is not None and call.part is not None:
            num_rows = call.table.shape[call.part.dim]
            if num_rows < self._num_tokens:
                return
            self.num_rows = min(num_rows, self.num_rows or num_rows)
        self.uses[call.count] = Use.POSITIONS
        self._follow(result, frozenset([call.count]))

    def _follow_uses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
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


class CountingMode(TorchFunctionMode):
    """While open, counts are followed, and nothing else is changed."""

    def __init__(self, follower: CountFollower) -> None:
        super().__init__()
        self._follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._follower.observe(func, args, kwargs, result)
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in arguments or results of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)

"""Token ids that a module's code treats in a way of its own: padding, ends of documents, whatever it compares ids with.

A mask may hang on such an id, and a few random tokens do not show it: there are a hundred thousand others. So a short
pass is watched for what the code makes of the ids themselves. Whatever it computes of each id alone can be computed of
all ids there are; where it says yes to few of them, or no to few, these are the special ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from shardwright.adapt.counting import tensors_in

MOST = 0.05
"""Share of all ids that special ones may be: what is more common shows in any long sequence of random tokens."""

_VIEWS = {
    "view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "expand_as", "repeat", "flatten",
    "clone", "contiguous", "detach", "narrow", "select", "flip", "roll", "movedim", "to", "long", "int", "type", "item",
}  # fmt: skip
"""Functions, without underscores, that leave ids what they are, wherever they put them."""

_BY_ELEMENT = {
    "eq", "ne", "lt", "le", "gt", "ge", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "isin",
    "add", "radd", "sub", "rsub", "mul", "rmul", "remainder", "fmod", "mod", "floor_divide", "floordiv", "clamp",
    "logical_not", "logical_and", "logical_or", "logical_xor", "bitwise_not", "bitwise_and", "bitwise_or", "invert",
    "and", "or", "xor", "bool", "where",
}  # fmt: skip
"""Functions, without underscores, that compute of each id by itself."""


class _IdFollower(TorchFunctionMode):
    """Follows ids through a forward pass; beside each tensor goes what the code would make of all ids there are.

    Args:
        input_ids: of the pass.
        vocab_size: number of ids.
    """

    def __init__(self, input_ids: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.special = torch.zeros(vocab_size, dtype=torch.bool)
        self._all = torch.arange(vocab_size)
        self._followed = {id(input_ids): (input_ids, self._all)}  # tensors are held, so that their ids are theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(id(tensor) in self._followed for tensor in tensors_in((args, kwargs))):
            table = self._table_of(func, args, kwargs)
            if table is not None and isinstance(result, Tensor):
                self._followed[id(result)] = (result, table)
        return result

    def _table_of(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """What a call that got ids would give for all of them; None if it is of no known kind."""
        name, first = func.__name__.strip("_"), args[0] if args else None
        is_first = id(first) in self._followed
        if is_first and (name in _VIEWS or name == "getitem"):
            return self._followed[id(first)][1]
        is_lookup = name == "getitem" and isinstance(first, Tensor) and first.ndim == 1
        if not is_lookup and name not in _BY_ELEMENT:
            return None
        try:
            table = func(*_pytree.tree_map(self._of_all, args), **_pytree.tree_map(self._of_all, kwargs))
        except (RuntimeError, IndexError):  # another operand is as long as the prompt
            return None
        if not isinstance(table, Tensor) or table.shape != self._all.shape or table.is_floating_point():
            return None
        if table.dtype == torch.bool:
            num_yes = int(table.sum())
            few = table if 2 * num_yes <= len(table) else ~table
            if int(few.sum()) <= max(1, MOST * len(table)):
                self.special |= few
        return table

    def _of_all(self, value: Any) -> Any:
        known = self._followed.get(id(value)) if isinstance(value, Tensor) else None
        if known is not None:
            return known[1]
        return value.cpu() if isinstance(value, Tensor) else value


def find_special_ids(module: nn.Module, tokens: Tensor, arguments: dict[str, Any], *, vocab_size: int) -> list[int]:
    """Ids that the code of a module treats in a way of its own, in a pass of these tokens.

    Args:
        module: weights loaded.
        tokens: [1, T] int64.
        arguments: that go with them.
        vocab_size: number of ids.

    Returns: ascending; none if the code only looks ids up.
    """
    follower = _IdFollower(tokens, vocab_size)
    with follower:
        module(tokens, **arguments)
    return follower.special.nonzero()[:, 0].tolist()


def ordinary_ids(vocab_size: int, special_ids: list[int]) -> Tensor:
    """All ids but the special ones, int64."""
    is_ordinary = torch.ones(vocab_size, dtype=torch.bool)
    is_ordinary[special_ids] = False
    return is_ordinary.nonzero()[:, 0]

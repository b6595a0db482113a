"""Scores on their way from the product of queries and keys to the product with the values, whatever is done to them.

Beside the numbers of the pass go those that the same code would make of products that are all zero: what it adds by
itself, which is its mask and its bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from shardwright.adapt.counting import tensors_in
from shardwright.errors import UnsupportedModelError

SOFTMAXES = {torch.softmax, torch.Tensor.softmax, F.softmax}
POWERS = {
    torch.exp: 1.0, torch.Tensor.exp: 1.0, torch.exp_: 1.0, torch.Tensor.exp_: 1.0,
    torch.exp2: math.log(2), torch.Tensor.exp2: math.log(2), torch.Tensor.exp2_: math.log(2),
}  # fmt: skip
"""Functions that a softmax written by hand begins with, and the logarithms of their bases."""

_IN_PLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__"}


@dataclass(slots=True, eq=False)
class AttentionTrace:
    """One attention computation that was seen."""

    is_sdpa: bool
    place: int
    """Of the call that makes the scores: among products, or among calls of scaled_dot_product_attention."""
    query: Tensor
    """[H, T, D]."""
    key: Tensor
    """[H, T, D]: repeated for each query head, if the code does so, or [K, T, D]."""
    value: Tensor | None = None
    """As `key`."""
    value_place: int | None = None
    """Of the product with the values, among products."""
    scores: Tensor | None = None
    """[H, T, T]: what went into the softmax; there may be more columns, before or after those of the positions."""
    blank: Tensor | None = None
    """As `scores`, had all products been zero."""
    weights: Tensor | None = None
    """[H, T, T]: what met the values."""
    blank_weights: Tensor | None = None
    """As `weights`, had all products been zero."""
    is_flex: bool = False
    """It is what flex_attention does, spelled out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of scaled_dot_product_attention: attn_mask, is_causal, scale."""

    def forget(self) -> None:
        """Let go of all numbers."""
        self.query = self.key = self.query.new_empty(0)
        self.value = self.scores = self.blank = self.weights = self.blank_weights = None
        self.options = {}


class Followed(Tensor):
    """Scores, or weights: what is computed from them is followed too."""

    attention: AttentionTrace
    blank: Tensor
    """The same of products that are all zero."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = followed_in((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            if attention is not None and attention.scores is None:
                _note_scores(func, args, kwargs, attention)
            is_elsewhere = is_in_place(func) and not isinstance(args[0], Followed)
            if attention is None or is_elsewhere:
                return func(*args, **kwargs)
            blank = func(*_each(args, _blank), **_each(kwargs, _blank))
            result = func(*args, **kwargs)
        return _follow_all(result, blank, attention)


def follow(tensor: Tensor, blank: Tensor, attention: AttentionTrace) -> Followed:
    """Follow scores, or weights.

    Args:
        tensor: of the pass.
        blank: the same of products that are all zero.
        attention: to which they belong; their softmax is noted there.
    """
    followed: Followed = tensor.as_subclass(Followed)
    followed.attention, followed.blank = attention, blank
    return followed


def followed_in(value: Any) -> AttentionTrace | None:
    """To which attention the followed tensors in the arguments of a call belong."""
    return next((tensor.attention for tensor in tensors_in(value) if isinstance(tensor, Followed)), None)


def plain(tensor: Tensor) -> Tensor:
    """The tensor, followed no more."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument."""
    name = func.__name__
    return name == "__setitem__" or name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _note_scores(func: Any, args: Any, kwargs: Any, attention: AttentionTrace) -> None:
    if func not in SOFTMAXES and func not in POWERS:
        return
    scores = args[0] if args else kwargs["input"]
    num_heads, length = attention.query.shape[:2]
    width = scores.shape[-1]
    if width < length or scores.numel() != num_heads * length * width:
        if func in POWERS:
            return  # of the largest of each row, for example
        raise UnsupportedModelError(f"its softmax is over {tuple(scores.shape)}, not over the positions alone")
    factor = POWERS.get(func, 1.0)
    attention.scores, attention.blank = (
        tensor.detach().as_subclass(Tensor).reshape(num_heads, length, width) * factor
        for tensor in (scores, _blank(scores))
    )


def _blank(value: Any) -> Any:
    return value.blank if isinstance(value, Followed) else value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return _pytree.tree_map(change, value)


def _follow_all(result: Any, blank: Any, attention: AttentionTrace) -> Any:
    """Follow every tensor of a result, which may be a tuple of some."""
    if next(tensors_in(result), None) is None:
        return result
    return _pytree.tree_map(
        lambda one, other: follow(one, other, attention) if isinstance(one, Tensor) else one, result, blank
    )

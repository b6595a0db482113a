"""Watch a module's forward pass for attention that its code computes itself.

One pass of a known number of tokens runs as its author wrote it. On the way, every call of scaled_dot_product_attention
is noted, and every product of two batches of activations that makes a [tokens, tokens] matrix is followed: through
whatever is done to it, into a softmax, and into the product with the values. Nothing is matched by name, so it does not
matter how scale, mask or cast are spelled. What the numbers mean is worked out in adapt/fit.py.

Functions are told apart later by their place in the order of calls, which is the same for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.adapt.products import Product, as_product
from shardwright.errors import UnsupportedModelError

_SOFTMAXES = {torch.softmax, torch.Tensor.softmax, F.softmax}


@dataclass(slots=True)
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
    """[H, T, T]: what went into the softmax."""
    weights: Tensor | None = None
    """[H, T, T]: what came out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of scaled_dot_product_attention: attn_mask, is_causal, scale."""


@dataclass(slots=True)
class ForwardTrace:
    """What one forward pass showed."""

    attentions: list[AttentionTrace] = field(default_factory=list)
    num_products: int = 0
    counting_aranges: set[int] = field(default_factory=set)
    """Places, among calls of torch.arange, of those that count the tokens."""
    counting_slices: set[int] = field(default_factory=set)
    """Places, among slicings of buffers and parameters, of those that take as many rows as there are tokens."""
    output: Tensor | None = None
    """[T, vocab] logits."""


class CallCounter:
    """Numbers the calls that matter, the same way while tracing and while serving."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = {id(t) for t in (*model.buffers(), *model.parameters())}
        self.num_products = self.num_sdpa = self.num_aranges = self.num_slices = 0

    def restart(self) -> None:
        self.num_products = self.num_sdpa = self.num_aranges = self.num_slices = 0

    def is_table_slice(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a call takes leading rows of a buffer or parameter: `table[:n]`, with whatever else behind."""
        if func is not torch.Tensor.__getitem__ or id(args[0]) not in self._tables:
            return False
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(index, slice) and index.start in (None, 0) and isinstance(index.stop, int)


class TracingMode(TorchFunctionMode):
    """Lets a forward pass run, and records its attention.

    Args:
        model: the module that runs.
        num_tokens: of the pass; best a number that occurs nowhere else in the model.
    """

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.trace = ForwardTrace()
        self._counter = CallCounter(model)
        self._num_tokens = num_tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counter, length = self._counter, self._num_tokens
        if func is F.scaled_dot_product_attention:
            self._note_sdpa(*args, **kwargs)
        elif func is torch.arange:
            if counts_tokens(args, kwargs, length):
                self.trace.counting_aranges.add(counter.num_aranges)
            counter.num_aranges += 1
        elif counter.is_table_slice(func, args):
            index = args[1][0] if isinstance(args[1], tuple) else args[1]
            if index.stop == length and args[0].shape[0] >= length:
                self.trace.counting_slices.add(counter.num_slices)
            counter.num_slices += 1
        elif (product := as_product(func, args, kwargs)) is not None:
            place, counter.num_products = counter.num_products, counter.num_products + 1
            self.trace.num_products = counter.num_products
            return self._trace_product(func, args, kwargs, product, place)
        return func(*args, **kwargs)

    def _note_sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        if query.ndim < 3 or query.shape[:-3].numel() != 1 or query.shape[-2] != self._num_tokens:
            raise UnsupportedModelError(f"it attends from {tuple(query.shape)} to {tuple(key.shape)}")
        self.trace.attentions.append(
            AttentionTrace(
                is_sdpa=True,
                place=self._counter.num_sdpa,
                query=query.detach().flatten(0, -3),
                key=key.detach().flatten(0, -3),
                value=value.detach().flatten(0, -3),
                options=options,
            )
        )
        self._counter.num_sdpa += 1

    def _trace_product(self, func: Any, args: Any, kwargs: Any, product: Product, place: int) -> Any:
        followed = _followed((*args, *kwargs.values()))
        result = func(*args, **kwargs)
        if followed is not None:  # the weights meet the values
            if followed.weights is not None and followed.value is None:
                followed.value, followed.value_place = _plain(product.right), place
            return _plain(result)
        shape = (product.left.shape[1], product.right.shape[2])
        if shape != (self._num_tokens, self._num_tokens):
            return result
        attention = AttentionTrace(
            is_sdpa=False,
            place=place,
            query=product.left.detach(),
            key=product.right.detach().transpose(1, 2),
        )
        self.trace.attentions.append(attention)
        return _follow(result, attention)


class Followed(Tensor):
    """Scores, or weights, on their way: what is computed from them is followed too."""

    attention: AttentionTrace

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = _followed((*args, *kwargs.values()))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if attention is None or not isinstance(result, Tensor):
            return result
        if func in _SOFTMAXES:
            length = attention.query.shape[1]
            scores = _plain(args[0] if args else kwargs["input"])
            if scores.shape[-1] != length or scores.numel() != attention.query.shape[0] * length * length:
                raise UnsupportedModelError(f"its softmax is over {tuple(scores.shape)}, not over the positions alone")
            attention.scores = scores.detach().clone().reshape(-1, length, length)
            attention.weights = _plain(result).detach().reshape(-1, length, length)
        return _follow(result, attention)


def counts_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> bool:
    """Whether a call of torch.arange with these arguments counts `length` tokens from 0."""
    bounds = args if args else (kwargs.get("start", 0), kwargs.get("end"))
    return bounds in ((length,), (0, length))


def _followed(values: tuple[Any, ...]) -> AttentionTrace | None:
    found: Iterator[Followed] = (value for value in values if isinstance(value, Followed))
    return next((value.attention for value in found), None)


def _follow(result: Any, attention: AttentionTrace) -> Any:
    if not isinstance(result, Tensor):
        return result
    followed: Followed = result.as_subclass(Followed)
    followed.attention = attention
    return followed


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)

"""The calls of a forward pass that matter, told apart by their order, which is the same while tracing and serving."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.adapt.flex import FLEX, attend_openly
from shardwright.adapt.products import Product, RowLabels, as_product


class CallCounter:
    """Knows and numbers the calls of one forward pass after another.

    Args:
        model: the module that runs.
        num_tokens: of a traced pass.
        row_labels: of einsums, as a traced pass showed them (see adapt/products.py).
    """

    def __init__(
        self, model: nn.Module, *, num_tokens: int | None = None, row_labels: dict[str, str] | None = None
    ) -> None:
        self.row_labels = RowLabels(num_tokens, {} if row_labels is None else row_labels)
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.restart()

    def restart(self) -> None:
        """Begin to count a forward pass."""
        self.num_products = self.num_sdpa = self.num_lasts = 0

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        """The product of activations that a call computes, if it is one."""
        return as_product(func, args, kwargs, self._is_weight, self.row_labels)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.nn.functional that does not hand itself over to modes as a whole: they see what it calls."""
    assert isinstance(function, FunctionType)
    namespace = function.__globals__ | {"has_torch_function": lambda tensors: False}
    opened = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


OPENED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    FLEX: attend_openly,
}
"""Functions that attend inside, and what to call in their place to see it."""


def takes_last_token(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call takes the last token of [1, T, C]: `x[:, -1]`, `x[:, -1:, :]`, `x[:, [-1], :]`."""
    if func is not torch.Tensor.__getitem__ or args[0].ndim != 3 or len(args[0]) != 1:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if len(index) < 2 or not all(isinstance(entry, (int, list, slice)) for entry in index):
        return False
    return index[1] in (-1, [-1], slice(-1, None)) and all(entry == slice(None) for entry in (index[0], *index[2:]))

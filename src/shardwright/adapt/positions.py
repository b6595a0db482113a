"""Code that counts positions by itself, with `arange(length)`, although it is given position_ids.

In a packed batch the length is that of all requests together, so such a count is wrong for all but the first. A probe
notices the call; while the model serves, it gets the true positions back instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CountingDetector(TorchFunctionMode):
    """Notes calls of torch.arange that count `length` tokens from 0."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.found = False
        self._length = length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.arange and counts_tokens(args, kwargs, self._length):
            self.found = True
        return func(*args, **kwargs)


@contextmanager
def feed_positions(position_ids: Tensor) -> Iterator[None]:
    """While open, `torch.arange(T)` gives the packed batch's positions, T being its number of tokens.

    Args:
        position_ids: [T] int64.
    """
    arange = torch.arange

    def arange_or_positions(*args: Any, **kwargs: Any) -> Tensor:
        if counts_tokens(args, kwargs, len(position_ids)):
            return position_ids.to(dtype=kwargs.get("dtype") or position_ids.dtype, copy=True)
        return arange(*args, **kwargs)

    torch.arange = arange_or_positions
    try:
        yield
    finally:
        torch.arange = arange


def counts_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> bool:
    """Whether a call of torch.arange with these arguments counts `length` tokens from 0."""
    bounds = args if args else (kwargs.get("start", 0), kwargs.get("end"))
    return kwargs.get("step", 1) == 1 and bounds in ((length,), (0, length), (0, length, 1))

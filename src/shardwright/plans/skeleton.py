"""A copy of a model to look at: on "meta", where it takes no memory, or with zeros for what is on "meta"."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def skeleton(module: nn.Module, *, on_meta: bool) -> nn.Module:
    """Copy a model, so that nothing that its code does stays behind in it.

    Args:
        module: on "meta" or not.
        on_meta: whether every tensor of the copy is on "meta"; else parameters are zeros, for code that looks at values
            on its way, in memory that the system provides when it is written: it never is.
    """
    copies: dict[int, Any] = {}
    for tensor in held_tensors(module):
        if on_meta:
            copied = tensor.detach().to("meta")
        elif isinstance(tensor, nn.Parameter) or tensor.is_meta:
            memory = torch.from_numpy(np.zeros(max(tensor.nbytes, 1), dtype=np.uint8))[: tensor.nbytes]
            copied = memory.view(tensor.dtype).view(tensor.shape)
        else:
            copied = tensor.detach().to("cpu", copy=True)
        copies[id(tensor)] = nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(module, copies)


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and whatever other tensors a module and those in it keep."""
    for owner in module.modules():
        yield from _tensors(vars(owner))


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)

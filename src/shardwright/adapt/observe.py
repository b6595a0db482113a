"""Watch a module run a few tokens, before it has weights, for the tables that it looks positions up in.

A copy runs, so that nothing stays behind in the module: on "meta", where it costs next to nothing, or with zeros for
weights, where its code looks at values on the way.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.adapt.arguments import plain_arguments
from shardwright.adapt.eager import eager
from shardwright.adapt.logits import logits_of
from shardwright.adapt.remembered import Remembered, global_tensors

logger = logging.getLogger(__name__)

ORDINARY_ID = 5
"""The first few often stand for padding and the like."""


class Observation(TorchFunctionMode):
    """What a forward pass showed.

    Positions are what code computes from counting or from tables of whole numbers, and not from the tokens.

    Args:
        module: about to run.
        input_ids: [1, T], what it will run on; T is best a number that is no size of the module.
    """

    def __init__(self, module: nn.Module, input_ids: Tensor) -> None:
        super().__init__()
        self.vocab_size: int | None = None
        self.position_rows: list[int] = []
        """Lengths of the tables that positions were looked up in, or that were cut to the number of tokens."""
        self._num_tokens = input_ids.numel()
        tables = (*held_tensors(module), *global_tensors(module))
        self._tables = {id(tensor): tensor for tensor in tables}
        self._tokens = {id(input_ids): input_ids}
        self._counts = {id(table): table for table in self._tables.values() if _is_whole(table)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.__getitem__ and id(args[0]) in self._tables:
            self.position_rows += [rows for rows in _cut_to(self._num_tokens, *args) if rows > self._num_tokens]
        if _is_whole(result):
            is_made = func is torch.arange or func.__name__.endswith("_like")
            kinds = [self._counts] if is_made else [kind for value in args if (kind := self._kind(value)) is not None]
            if kinds:  # what it is computed from first decides
                kinds[0][id(result)] = result
        elif (lookup := _lookup(func, args, kwargs)) is not None:
            table, index = lookup
            if id(index) in self._counts and table.shape[0] >= index.numel() == self._num_tokens:
                self.position_rows.append(table.shape[0])
        return result

    def _kind(self, value: Any) -> dict[int, Tensor] | None:
        return next((kind for kind in (self._tokens, self._counts) if id(value) in kind), None)


@eager
def observe(module: nn.Module, num_tokens: int, *, on_meta: bool = True) -> Observation | Exception:
    """Run so many tokens through a copy of the module. Returns what was seen, or why it fails."""
    device = "meta" if on_meta else "cpu"
    outside = Remembered(module)  # what is not in the copy
    try:
        with torch.inference_mode(), torch.device(device):
            input_ids = torch.full((1, num_tokens), ORDINARY_ID)
            skeleton = _copy(module, on_meta=on_meta)
            observation = Observation(skeleton, input_ids)
            with observation:
                output = skeleton(input_ids, **plain_arguments(module, input_ids))
            observation.vocab_size = logits_of(output).shape[-1]
    except Exception as exc:  # of the module's code; it may also be too many tokens for it
        logger.debug("%d tokens on %s: %s: %s", num_tokens, device, type(exc).__name__, exc)
        return exc
    finally:
        outside.restore()
    return observation


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and whatever other tensors a module and those in it keep."""
    for owner in module.modules():
        yield from _tensors(vars(owner))


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _copy(module: nn.Module, *, on_meta: bool) -> nn.Module:
    """A copy of a module whose tensors are on "meta", or real with zeros for what is on "meta"."""
    copies: dict[int, Any] = {}
    for tensor in held_tensors(module):
        if on_meta:
            copied = tensor.detach().to("meta")
        elif tensor.is_meta:  # in memory that the system provides when it is written: it never is
            memory = torch.from_numpy(np.zeros(max(tensor.nbytes, 1), dtype=np.uint8))[: tensor.nbytes]
            copied = memory.view(tensor.dtype).view(tensor.shape)
        else:
            copied = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone()
        copies[id(tensor)] = nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(module, copies)


def _lookup(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """Table and index of a call that looks rows up."""
    if func is F.embedding:
        index, table = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    elif func is Tensor.__getitem__:
        table, index = args[0], args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    elif func in (torch.index_select, Tensor.index_select) and len(args) == 3 and args[1] == 0:
        table, index = args[0], args[2]
    else:
        return None
    return (table, index) if _is_whole(index) and table.ndim > 1 else None


def _cut_to(num_tokens: int, table: Tensor, index: Any) -> Iterator[int]:
    """Sizes of the dimensions of a table of which an index such as `[:, :T]` takes the first `num_tokens`."""
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (table.ndim - len(parts) + 1)
    for size, part in zip(table.shape, parts, strict=False):
        if isinstance(part, slice) and part.start in (None, 0) and part.stop == num_tokens:
            yield size


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)

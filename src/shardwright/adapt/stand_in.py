"""Tensors in place of others that nobody computes: they have the shape and type of them, and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from shardwright.adapt.counting import tensors_in

_NUMBERS = {"item": int, "__bool__": bool, "__int__": int, "__index__": int, "__float__": float}
_INDEXING = {"__getitem__", "__setitem__"}


class StandIn(Tensor):
    """A tensor on "meta" that mixes with tensors anywhere: what is computed from it is a stand-in too."""

    @classmethod
    def like(cls, meta: Tensor) -> StandIn:
        """A stand-in with the shape and dtype of a tensor on "meta"."""
        return meta.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:  # wherever it is sent, there is nothing to send
            args = (args[0], *(a.dtype if isinstance(a, Tensor) else a for a in args[1:] if not _is_device(a)))
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            if len(args) == 1 and not kwargs:
                return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_pytree.tree_map(_on_meta, args), **_pytree.tree_map(_on_meta, kwargs))
        if isinstance(result, Tensor):
            return StandIn.like(result)
        has_tensors = next(tensors_in(result), None) is not None
        return _pytree.tree_map_only(Tensor, StandIn.like, result) if has_tensors else result


def answer_of_zeros(func: Any, args: tuple[Any, ...]) -> tuple[Any] | None:
    """What a call that asks for values of a stand-in gets if all of them are zero, alone in a tuple.

    Returns: None if the call asks for no values, or not in a way that is known.
    """
    tensor, name = (args[0] if args else None), func.__name__
    if name in _INDEXING and any(isinstance(t, StandIn) and t.dtype == torch.bool for t in tensors_in(args[1])):
        if name == "__setitem__":
            return (None,)
        mask = args[1]
        return (StandIn.like(args[0].new_empty((0, *args[0].shape[mask.ndim :]), device="meta")),)
    if not isinstance(tensor, StandIn):
        return None
    if name in _NUMBERS:
        return (_NUMBERS[name](0),)
    if name == "tolist":
        return (torch.zeros(tensor.shape, dtype=tensor.dtype).tolist(),)
    none = torch.empty(0, tensor.ndim, dtype=torch.int64, device="meta")
    if name in ("nonzero", "argwhere"):
        return (StandIn.like(none),)
    if name == "where" and len(args) == 1:
        return (tuple(StandIn.like(column) for column in none.unbind(1)),)
    return None


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str))


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and value.device.type != "meta" else value

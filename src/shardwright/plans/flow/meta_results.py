"""What operations return on "meta", worked out once for arguments of the same form.

PyTorch works out most of these results in Python, which takes longer than a small product of matrices. A model's layers
do the same over and over, and a model is followed more than once.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

MOST_RESULTS = 10_000
"""That are remembered. A model takes some dozens for every kind of layer."""

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a tensor in memory of its own."""

_results: dict[Hashable, Form] = {}


def run_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation, all of whose tensors are on "meta"."""
    if not _makes_a_tensor(func):
        return func(*args, **kwargs)
    key = func, torch.get_default_dtype(), _frozen(args), _frozen(kwargs)
    form = _results.get(key)
    if form is not None:
        return _empty(form)
    result = func(*args, **kwargs)
    if _is_of_its_own(result, args, kwargs):
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = result.size(), result.stride(), result.dtype
    return result


@cache
def _makes_a_tensor(func: Any) -> bool:
    """Whether an operation returns one tensor and changes nothing, by what it says of itself."""
    returns = func._schema.returns
    is_tensor = len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)
    return is_tensor and returns[0].alias_info is None and not func._schema.is_mutable


def _is_of_its_own(result: Any, args: Any, kwargs: Any) -> bool:
    """Whether a result is in memory of its own, all of it: some operations return views without saying so."""
    if not isinstance(result, Tensor) or result.is_conj() or result.is_neg():
        return False
    memory = result.untyped_storage()
    given = (leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    if memory._cdata in given or result.storage_offset():
        return False
    return _empty((result.size(), result.stride(), result.dtype)).untyped_storage().nbytes() == memory.nbytes()


def _empty(form: Form) -> Tensor:
    size, stride, dtype = form
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _frozen(value: Any) -> Hashable:
    """Arguments with forms in place of tensors, so that those of the same form are equal."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype, value.is_conj()
    if isinstance(value, list | tuple):
        return tuple([_frozen(item) for item in value])
    if isinstance(value, dict):
        return tuple([(key, _frozen(item)) for key, item in value.items()])
    return type(value), value  # 1 and 1.0 are equal, and give other types

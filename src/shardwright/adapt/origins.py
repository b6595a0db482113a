"""Which number of which tensor each element of another is a copy of.

While a forward pass runs, on "meta" too, every element of a tensor has a tag of its own. Views need no care: tags lie
in a storage of the same layout as that of the tensor, and are read with its sizes and strides. What copies (cat, clone,
copy_, repeat, ...) copies tags along; whatever else computes makes new elements, with new tags. Two elements with one
tag are the same number, whatever code has moved them there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

COPIES = {
    aten.cat.default, aten.stack.default, aten.clone.default, aten.repeat.default, aten.index_select.default,
    aten.expand_copy.default, aten.flip.default, aten.roll.default, aten._to_copy.default,
}  # fmt: skip
"""Functions whose results hold elements of their arguments and no others."""

DECOMPOSED = {
    "aten::reshape", "aten::reshape_as", "aten::contiguous", "aten::flatten", "aten::to", "aten::type_as",
    "aten::repeat_interleave", "aten::tile", "aten::concat", "aten::concatenate", "aten::hstack", "aten::vstack",
}  # fmt: skip
"""Functions that are made of those that copy, and of views."""

MAX_ELEMENTS = 1 << 24
"""Larger tensors, which are no activations of a few tokens, are not followed."""


class OriginsMode(TorchDispatchMode):
    """Keeps the tags of what a forward pass computes, until it is told to forget them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self._tags: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in DECOMPOSED and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in COPIES:
            self._set(result, lambda: self._copied(func, args, kwargs))
        elif func is aten.copy_.default:
            self._set(args[0], lambda: self.of(args[1]))
        else:
            for argument, given in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                    self.renew(given)
        return result

    def of(self, tensor: Tensor) -> Tensor:
        """Tags of a tensor's elements: int64, on the CPU, a view."""
        storage = tensor.untyped_storage()
        num_elements = storage.nbytes() // tensor.itemsize
        known = self._tags.get(storage._cdata)
        if known is None or len(known[1]) != num_elements:  # not seen yet, or seen as numbers of another size
            known = storage, self._fresh((num_elements,))
            self._tags[storage._cdata] = known
        return known[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def renew(self, tensor: Tensor) -> Tensor:
        """Give a tensor's elements new tags, one after another. Returns them."""
        tags = self._fresh(tensor.shape)
        self._set(tensor, lambda: tags)
        return tags

    def forget(self) -> None:
        """Let go of all tags and of the memory that they belong to; what is looked at later has new ones."""
        self._tags.clear()

    def _fresh(self, shape: Sequence[int]) -> Tensor:
        first, self._next = self._next, self._next + prod(shape)
        return torch.arange(first, self._next).view(tuple(shape))

    def _set(self, tensor: Tensor, make_tags: Callable[[], Tensor]) -> None:
        if tensor.numel() > MAX_ELEMENTS or tensor.untyped_storage().nbytes() > MAX_ELEMENTS * tensor.itemsize:
            self._tags.pop(tensor.untyped_storage()._cdata, None)
        else:
            self.of(tensor).copy_(make_tags())

    def _copied(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        """Tags of the result of a function that copies."""
        if func is aten._to_copy.default:
            return self.of(args[0])
        if func is aten.index_select.default:
            source, dim, index = args
            if index.is_meta:
                return self._fresh((*source.shape[:dim], len(index), *source.shape[dim:][1:]))
            return self.of(source).index_select(dim, index.cpu())
        args = _pytree.tree_map(lambda value: self.of(value) if isinstance(value, Tensor) else value, args)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("memory_format", "dtype", "device")}
        tags: Tensor = func(*args, **kwargs)
        return tags

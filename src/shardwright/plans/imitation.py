"""In place of a module that does not run: what has the form of its output, so that the code around it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardwright.plans.dataflow import NUM_TOKENS
from shardwright.plans.nested import Form, Path, rebuilt, tensors_with_paths


class Imitation:
    """Called as the module was when it was looked at, it returns what that would, but for the numbers.

    Args:
        given: forms of the arguments, (args, kwargs).
        returned: form of the output.
        copies: whether the output may be written to. Else it may be an argument by another name.
    """

    def __init__(self, given: Any, returned: Any, copies: bool) -> None:
        self._forms = dict(_forms(given))
        self._returned = returned
        self._copies = copies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self._imitated(self._returned, dict(tensors_with_paths((args, kwargs))))

    def _imitated(self, form: Any, given: dict[Path, Tensor]) -> Any:
        if isinstance(form, Form):
            alike = next((given[path] for path, other in self._forms.items() if other == form and path in given), None)
            if alike is None:
                return self._zeros(form, given)
            return alike.clone() if self._copies else alike.view_as(alike)
        if isinstance(form, dict):
            return {key: self._imitated(item, given) for key, item in form.items()}
        if isinstance(form, list):
            return [self._imitated(item, given) for item in form]
        if isinstance(form, tuple):
            return rebuilt(form, [self._imitated(item, given) for item in form])
        return form

    def _zeros(self, form: Form, given: dict[Path, Tensor]) -> Tensor:
        """As large as the arguments make it: as many sequences, and as many tokens."""
        sizes: dict[tuple[int, int], int] = {}
        num_tokens, device = NUM_TOKENS, torch.device("cpu")
        for path, other in self._forms.items():
            if (tensor := given.get(path)) is None or tensor.ndim != len(other.shape):
                continue
            device = tensor.device
            for dim, (old, new) in enumerate(zip(other.shape, tensor.shape, strict=True)):
                sizes[dim, old] = new
                if old == NUM_TOKENS:
                    num_tokens = new
        shape = [
            sizes.get((dim, size), num_tokens if size == NUM_TOKENS else size) for dim, size in enumerate(form.shape)
        ]
        return torch.zeros(shape, dtype=form.dtype, device=device)


def has_forms(given: Any) -> bool:
    """Whether arguments have tensors, from which the size of what is returned can be told."""
    return next(_forms(given), None) is not None


def _forms(value: Any, path: Path = ()) -> Iterator[tuple[Path, Form]]:
    """Forms, and the paths of the tensors that they stand for."""
    if isinstance(value, Form):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _forms(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _forms(item, (*path, index))

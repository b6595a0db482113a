"""An input that says it is as wide as this rank's part of what is made of it.

Code such as nanoGPT's takes the width of its heads and of its output from its input:

    B, T, C = x.size()
    q = self.query(x).view(B, T, self.n_head, C // self.n_head)
    y = attention.transpose(1, 2).reshape(B, T, C)

On a rank the input is whole and both are not. Told the width of this rank's part for C, the code is right as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.layers.parallel_module import Parallel


class LocalWidthInput(Parallel):
    """Its first input of a certain width says that it is narrower; the numbers in it are all there."""

    whole_width: int
    """Last dimension of the input."""
    local_width: int
    """What it says of that."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        for position, value in enumerate(args):
            if self._is_wide(value):
                return super().forward(*args[:position], self._told(value), *args[position + 1 :], **kwargs)
        for name, value in kwargs.items():
            if self._is_wide(value):
                return super().forward(*args, **{**kwargs, name: self._told(value)})
        return super().forward(*args, **kwargs)

    def _is_wide(self, value: Any) -> bool:
        return is_features(value) and value.shape[-1] == self.whole_width

    def _told(self, value: Tensor) -> Tensor:
        told = value.as_subclass(_SaysWidth)
        told.says = self.local_width
        return told


def is_features(value: Any) -> bool:
    """Whether a value is a tensor whose last dimension are features of tokens."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point()


class _SaysWidth(Tensor):
    """A tensor whose code is told another last dimension; whatever is computed from it is a tensor as any other."""

    says: int

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.size and (len(args) > 1 or kwargs):
                told, (dim,) = args[0], (*args[1:], *kwargs.values())
                return told.says if dim in (-1, told.dim() - 1) else told.size(dim)
            result = func(*args, **kwargs)
            if func == Tensor.size or func == _SHAPE:
                return torch.Size((*result[:-1], args[0].says))
        return result


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]

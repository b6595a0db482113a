"""Modules that a GPU computes in one launch where their code takes many: norms.

Their parameters stay where they are, and so do they; only their `forward` is another one, which leaves to the old one
what it was not looked at for. Modules with hooks, and those with a `forward` of their own already, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.norms import FoundNorm, as_norm

Forward = Callable[..., Any]


class FewLaunches:
    """What can be computed in one launch in a model.

    Args:
        module: weights loaded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms: dict[str, tuple[nn.Module, FoundNorm]] = {}
        for name, part in module.named_modules():
            if _is_plain(part) and (found := as_norm(part)) is not None:
                self._norms[name] = part, found

    @property
    def norms(self) -> list[str]:
        """Names of modules that are norms."""
        return list(self._norms)

    def apply(self) -> Callable[[], None]:
        """Let them be computed so; the model is on a device that Triton's kernels run on.

        Returns: what gives all modules their own code back.
        """
        replaced = []
        for module, found in self._norms.values():
            module.forward = _norm(module, found)
            replaced.append(module)

        def undo() -> None:
            for module in replaced:
                del module.forward

        return undo


def _is_plain(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _norm(module: nn.Module, found: FoundNorm) -> Forward:
    from shardwright.kernels.triton.norm import norm

    own = module.forward
    dtype, size = getattr(module, found.weight).dtype, len(getattr(module, found.weight))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _takes(args[0], dtype, size):
            return own(*args, **kwargs)
        bias = None if found.bias is None else getattr(module, found.bias)
        with torch._C.DisableTorchFunction():  # of those who watch what the model's code calls
            return norm(args[0], getattr(module, found.weight), bias, found.kind)

    return forward


def _takes(value: object, dtype: torch.dtype, size: int) -> bool:
    return isinstance(value, Tensor) and value.dtype is dtype and value.ndim > 0 and value.shape[-1] == size

"""Watch a forward pass: the output of every module, in the order in which modules finish."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module."""

    module: str
    """Qualified name; empty for the model itself."""
    number: int
    """How often it had been called before."""
    outputs: tuple[Tensor, ...]
    """Copies of the floating-point tensors that it returned."""


class Recorder:
    """Records the calls of a module and all modules in it, while it is open."""

    def __init__(self, module: nn.Module, *, keep_root: bool = True) -> None:
        self._module = module
        self._keep_root = keep_root
        self._handles: list[RemovableHandle] = []
        self._counts: dict[str, int] = {}
        self._running: list[str] = []
        self.calls: list[Call] = []

    @property
    def running(self) -> str:
        """The innermost module whose forward has begun and not ended: where an exception came from."""
        return self._running[-1] if self._running else ""

    def __enter__(self) -> Recorder:
        for name, owner in self._module.named_modules():
            if name or self._keep_root:
                self._handles.append(owner.register_forward_pre_hook(self._enter(name), prepend=True))
                self._handles.append(owner.register_forward_hook(self._leave(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._running.append(name)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            while self._running.pop() != name:  # what is inside and was left by an exception that somebody caught
                pass
            number = self._counts.get(name, 0)
            self._counts[name] = number + 1
            self.calls.append(Call(name, number, tensors_of(output)))

        return hook


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """Copies of the floating-point tensors in whatever a module returns, in the order in which they stand there."""
    leaves = tree_leaves(output)
    return tuple(leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor) and torch.is_floating_point(leaf))

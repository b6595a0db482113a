"""Modules that take few launches on a GPU where their code takes many: norms, and gated activations between linears.

They stay where they are, and only their `forward` is another one, which leaves to the old one what it was not looked at
for. Weights of a gate and of what it is multiplied by come to lie in one piece, so that they are one product. Modules
with hooks, and those with a `forward` of their own already, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.gated import FoundGated, as_gated
from shardwright.layers.norms import FoundNorm, as_norm

Forward = Callable[..., Any]


class FewLaunches:
    """What can be computed in one launch in a model.

    Args:
        module: weights loaded.
        without: names of modules that others compute already, with all that is in them.
    """

    def __init__(self, module: nn.Module, without: Sequence[str] = ()) -> None:
        self._norms: dict[str, tuple[nn.Module, FoundNorm]] = {}
        self._gated: dict[str, tuple[nn.Module, FoundGated]] = {}
        for name, part in module.named_modules():
            if not _is_plain(part) or any(f"{name}.".startswith(f"{other}.") for other in without):
                continue
            if (norm := as_norm(part)) is not None:
                self._norms[name] = part, norm
            elif all(map(_is_plain, part.children())) and (gated := as_gated(part)) is not None:
                self._gated[name] = part, gated

    @property
    def norms(self) -> list[str]:
        """Names of modules that are norms."""
        return list(self._norms)

    @property
    def gated(self) -> list[str]:
        """Names of modules that are linears around a gated activation."""
        return list(self._gated)

    def apply(self) -> Callable[[], None]:
        """Let them be computed so; the model is on a device that Triton's kernels run on.

        Returns: what gives all modules their own code back.
        """
        forwards = [(module, _norm(module, found)) for module, found in self._norms.values()]
        forwards += [(module, _gated(module, found)) for module, found in self._gated.values()]
        for module, forward in forwards:
            module.forward = forward

        def undo() -> None:
            for module, _ in forwards:
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


def _gated(module: nn.Module, found: FoundGated) -> Forward:
    from shardwright.kernels.triton.gated import gated

    own = module.forward
    children = dict(module.named_children())
    first, last = children[found.first], children[found.last]
    assert isinstance(first, nn.Linear)
    weight: Tensor = first.weight
    bias: Tensor | None = first.bias
    if found.second is not None:
        second = children[found.second]
        assert isinstance(second, nn.Linear)
        weight = _in_one_piece(weight, second.weight)
        bias = None if bias is None else _in_one_piece(bias, second.bias)
    dtype, size = weight.dtype, weight.shape[1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _takes(args[0], dtype, size):
            return own(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            both = nn.functional.linear(args[0], weight, bias)
            between = gated(both, found.activation, is_gate_first=found.is_gate_first)
        return last(between)

    return forward


@torch.no_grad()
def _in_one_piece(one: Tensor, other: Tensor) -> Tensor:
    """Both, one after the other along the first dimension; they become parts of it."""
    whole = torch.cat([one, other])
    one.data, other.data = whole[: len(one)], whole[len(one) :]
    return whole


def _takes(value: object, dtype: torch.dtype, size: int) -> bool:
    return isinstance(value, Tensor) and value.dtype is dtype and value.ndim > 0 and value.shape[-1] == size

"""What one rank loads of a checkpoint: its slices, read from where they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shardwright.loading.lazy import LazyTensor

if TYPE_CHECKING:
    from shardwright.plans.slices import ShardSlice


def whole_state(module: nn.Module, part: ShardSlice) -> dict[str, Tensor]:
    """Every entry of a module's state dict as it is before the module is cut, on "meta"."""
    state = {}
    for name, tensor in module.state_dict().items():
        shape = part.whole_shape(name)
        state[name] = torch.empty(tensor.shape if shape is None else shape, dtype=tensor.dtype, device="meta")
    return state


def take_part(name: str, value: Tensor | LazyTensor, part: ShardSlice) -> Tensor | None:
    """This rank's part of a whole tensor, in memory of its own; None if it holds nothing of it.

    What is not this rank's is not read.
    """
    if not part.holds(name):
        return None
    if isinstance(value, Tensor):
        return part.take(name, value).clone(memory_format=torch.contiguous_format)
    if part.is_zero(name):
        return value.read(((0, 0),) * value.ndim).new_zeros(value.shape)
    cut = part.cut(name)
    taken = value.whole() if cut is None else value.part(*cut)
    return taken.clone(memory_format=torch.contiguous_format)


class PartTarget:
    """Stands for a whole Transformers model while its loader runs, and keeps this rank's part of what it is given.

    Args:
        model: cut for this rank.
        part: what the rank holds.
    """

    def __init__(self, model: nn.Module, part: ShardSlice) -> None:
        self._model = model
        self._part = part
        self._whole = whole_state(model, part)

    def state_dict(self) -> dict[str, Tensor]:
        """Names and shapes of the whole model."""
        return dict(self._whole)

    def get_parameter(self, name: str) -> Tensor:
        """On "meta", of the whole model."""
        return self._whole[name]

    def get_submodule(self, name: str) -> _ModuleTarget:
        """A module to set parameters of."""
        return _ModuleTarget(self, name)

    def put(self, name: str, value: Any) -> None:
        """Keep this rank's part of a parameter or buffer."""
        taken = take_part(name, value, self._part)
        if taken is None:
            return
        owner, _, leaf = name.rpartition(".")
        held = self._model.get_submodule(owner)
        new = taken if leaf in held._buffers else nn.Parameter(taken, requires_grad=False)
        new._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(held, leaf, new)

    def __getattr__(self, name: str) -> Any:
        whole = self.__dict__.get("_whole", {})  # parameters of the model's own, of no module in it
        return whole[name] if name in whole else getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_whole", {}):
            self.put(name, value)
        else:
            object.__setattr__(self, name, value)


class _ModuleTarget:
    """A module of the whole model: gives shapes, takes parameters."""

    def __init__(self, target: PartTarget, name: str) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_prefix", f"{name}." if name else "")
        object.__setattr__(self, "_buffers", target._model.get_submodule(name)._buffers)

    def __getattr__(self, name: str) -> Any:
        return self._target.get_parameter(f"{self._prefix}{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._target.put(f"{self._prefix}{name}", value)

"""Watch the calls of modules that are given the cache: with what, what they hand to it, what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache

from shardwright.adapt.own_calls import Path, leaves_of
from shardwright.cache.spec import Visibility

FindMask = Callable[[Tensor], Visibility | None]


@dataclass(frozen=True, slots=True)
class SeenValue:
    """An argument or a result, or what is inside one."""

    shape: tuple[int, ...] | None
    """None of what is no tensor."""
    dtype: torch.dtype | None = None
    visibility: Visibility | None = None
    """Of a mask that Transformers made."""
    is_cache: bool = False
    number: float | None = None
    """Of what is one, and no tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class SeenWrite:
    """A call by which something was handed to the cache."""

    call: SeenCall
    """The innermost in which it was made."""
    layer: int
    method: str
    tensors: tuple[SeenValue, ...]


@dataclass(slots=True, eq=False)
class SeenCall:
    """A call of a module that was given the cache."""

    module: nn.Module
    parent: SeenCall | None
    """The call in which it was made."""
    arguments: dict[Path, SeenValue]
    results: dict[Path, SeenValue] = field(default_factory=dict)
    writes: list[SeenWrite] = field(default_factory=list)
    """Its own, and those of calls within."""

    def chain(self) -> list[SeenCall]:
        """The outermost call around it, and all between, to it."""
        return [*(self.parent.chain() if self.parent is not None else []), self]


class CallRecorder:
    """Sees a forward pass.

    Args:
        find_mask: what a tensor means, if it is a mask.
    """

    def __init__(self, find_mask: FindMask) -> None:
        self.calls: list[SeenCall] = []
        self.writes: list[SeenWrite] = []
        self.has_states = False
        """Whether a state was handed to the cache, that does not grow with the tokens."""
        self._find_mask = find_mask
        self._open: list[SeenCall] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        hooks = []
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def note_write(self, layer: int, method: str, *tensors: Tensor) -> None:
        """See what is handed to the cache."""
        if not self._open:  # by code of a module that has the cache from elsewhere
            return
        write = SeenWrite(self._open[-1], layer, method, tuple(self._seen(tensor) for tensor in tensors))
        self.writes.append(write)
        for call in self._open:
            call.writes.append(write)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        values = leaves_of((args, kwargs))
        if any(isinstance(value, Cache) for _, value in values):
            arguments = {path: self._seen(value) for path, value in values}
            call = SeenCall(module, self._open[-1] if self._open else None, arguments)
            self.calls.append(call)
            self._open.append(call)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open and self._open[-1].module is module:
            self._open.pop().results.update((path, self._seen(value)) for path, value in leaves_of(output))

    def _seen(self, value: Any) -> SeenValue:
        if not isinstance(value, Tensor):
            number = float(value) if isinstance(value, (int, float)) else None
            return SeenValue(None, is_cache=isinstance(value, Cache), number=number)
        return SeenValue(tuple(value.shape), value.dtype, self._find_mask(value))


class WatchedCache(DynamicCache):
    """Transformers' cache, with somebody who sees what is handed to it.

    Args:
        config: of the model's text part.
        recorder: who sees; may be another for another pass.
    """

    def __init__(self, config: PretrainedConfig, recorder: CallRecorder) -> None:
        super().__init__(config=config)
        self.recorder = recorder

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.recorder.note_write(layer_idx, "update", key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        self.recorder.note_write(layer_idx, "update_indexer", indexer_key_states)
        return super().update_indexer(indexer_key_states, layer_idx)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.recorder.has_states = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.recorder.has_states = True
        return super().update_recurrent_state(*args, **kwargs)

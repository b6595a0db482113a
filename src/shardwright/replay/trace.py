"""Watch the tensor operations of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.attention.kv_cache import KVCache, LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionParams, StepLayout
from shardwright.attention.native import NativeBackend
from shardwright.cache.spec import Visibility

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SeenTensor:
    """A tensor of a trace: where it lies and how."""

    storage: int
    """Number of its storage, in the order in which they were first seen."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """In elements."""


class Noted:
    """What is noted as a whole, and not as the tensor operations that it is made of."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class WriteCache(Noted):
    """A layer's keys and values go to the cache: arguments are both, [T, K, D] and [T, K, V]."""

    layer: int


@dataclass(frozen=True, slots=True)
class Attend(Noted):
    """A layer's attention of decodes: argument is the query, [T, H, D]; output [T, H, V]."""

    layer: int
    params: AttentionParams


@dataclass(frozen=True, slots=True)
class SeenCall:
    """One operation."""

    function: Callable[..., Any] | Noted
    """An ATen operator, or what is ours."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Tensors in them are SeenTensor."""
    output: Any
    """As `function` returns it, tensors in it SeenTensor."""


@dataclass(slots=True)
class Trace:
    """All operations of one step."""

    num_tokens: int
    calls: list[SeenCall] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    """A tensor of each storage, by its number; none of them is freed, so that no storage comes up twice."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Numbers of the storages that the step brings, by name."""
    output: SeenTensor | None = None


class TraceMode(TorchDispatchMode):
    """Notes every operation while it is active."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether each operation is to be kept from the compiler, which takes longer than noting it, and is off."""
        return False

    def __init__(self, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace(num_tokens)
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self.is_muted = False
        self._whole: set[Any] = {torch.ops.aten.linear.default}
        """Operations that are not made of others, or are left as they are."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_muted:
            return func(*args, **kwargs)
        if func not in self._whole:
            with self:  # an operation that is made of others is these others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self._whole.add(func)
        seen_args, seen_kwargs = self._seen(args), self._seen(kwargs)
        output = func(*args, **kwargs)
        self._add(SeenCall(func, seen_args, seen_kwargs, self._seen(output)), output)
        return output

    def _add(self, call: SeenCall, output: Any) -> None:
        """Note a call, whose output is at hand; those who want to know more than the trace come in here."""
        self.trace.calls.append(call)

    def note(self, function: Noted, args: Sequence[Any], call: Callable[[], T], **kwargs: Any) -> T:
        """Note an operation of ours, whose own operations are not looked at."""
        seen_args, seen_kwargs = self._seen(tuple(args)), self._seen(kwargs)
        with self.muted():
            output = call()
        self._add(SeenCall(function, seen_args, seen_kwargs, self._seen(output)), output)
        return output

    @contextmanager
    def muted(self) -> Iterator[None]:
        """While open, nothing is noted."""
        before, self.is_muted = self.is_muted, True
        try:
            yield
        finally:
            self.is_muted = before

    def look_at(self, tensor: Tensor) -> SeenTensor:
        """Where a tensor lies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self.trace.tensors.append(tensor)
        self._kept.append(tensor)
        return SeenTensor(
            self._numbers[key], tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        )

    def _seen(self, tree: Any) -> Any:
        return mapped(tree, Tensor, self.look_at)


def mapped(tree: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """Nested lists, tuples and dicts with everything of a kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) is tuple:
        return tuple([mapped(item, kind, change) for item in tree])
    if type(tree) is list:
        return [mapped(item, kind, change) for item in tree]
    if type(tree) is dict:
        return {key: mapped(item, kind, change) for key, item in tree.items()}
    return tree


class TracedCache:
    """A KV cache whose writes are noted."""

    def __init__(self, cache: KVCache, mode: TraceMode) -> None:
        self.layers = [_TracedLayer(layer, index, mode) for index, layer in enumerate(cache.layers)]
        self.group_of_layer = cache.group_of_layer


class _TracedLayer:
    def __init__(self, layer: LayerCache, index: int, mode: TraceMode) -> None:
        self.layer, self.index = layer, index
        self._mode = mode

    def write(self, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        self._mode.note(
            WriteCache(self.index), (key_TKD, value_TKV), lambda: self.layer.write(slot_mapping, key_TKD, value_TKV)
        )


class TracedBackend:
    """Implements AttentionBackend by another one, and notes what is asked of it."""

    def __init__(self, backend: NativeBackend, mode: TraceMode) -> None:
        self.block_size = backend.block_size
        self._backend = backend
        self._mode = mode

    def prepare(self, layout: StepLayout, block_tables: Any, visibility: Visibility) -> Any:
        with self._mode.muted():
            return self._backend.prepare(layout, block_tables, visibility)

    def write(self, cache: _TracedLayer, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        cache.write(slot_mapping, key_TKD, value_TKV)

    def forward(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: _TracedLayer,
        plan: Any,
        params: AttentionParams,
    ) -> Tensor:
        def call() -> Tensor:
            return self._backend.forward(query_THD, key_TKD, value_TKV, cache.layer, plan, params)

        return self._mode.note(Attend(cache.index, params), (query_THD,), call)

    def forward_latent(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        cache: _TracedLayer,
        plan: Any,
        params: AttentionParams,
        projection: LatentProjection,
    ) -> Tensor:
        """Of decodes: what is made of queries and outputs are operations like others, attention between is ours."""
        return projection.around(
            lambda query_THC: self.forward(query_THC, key_TKD, value_TKV, cache, plan, params),
            query_THD,
            self._backend.compute_dtype,
        )

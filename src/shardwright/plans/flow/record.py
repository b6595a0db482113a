"""One forward pass as a list of operations: what ran on which memory, inside which module.

A tensor is recorded as a place in memory: storage, sizes, strides. Views of one storage are then the same memory seen
differently, and need no rules. Tensors on "meta" have places too.

On "meta" only what comes from parameters is unknown. Everything else (positions, masks, counts of tokens per expert) is
computed for real, so code that looks at such values runs; choices that come from unknown numbers are made up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.plans.flow.meta_results import run_on_meta

MOST_REAL_ELEMENTS = 1 << 22
"""Larger tensors stay on "meta" though they could be computed."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as a place in memory, in elements."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    capacity: int
    """Elements of the whole storage."""
    is_integral: bool
    value: Tensor | None = field(default=None, compare=False)
    """Of a small tensor of whole numbers that does not depend on the tokens."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: tensors of its arguments and results as `Ref`."""

    name: str
    """Without its overload: `aten.add_`."""
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    call: int
    """Number of the innermost module call that it belongs to."""


@dataclass(slots=True)
class Call:
    """One call of a module."""

    module: str
    parent: int | None
    arguments: dict[str, Any]
    """By the names of its forward: refs, and `...` for what holds no tensor."""
    outputs: tuple[Ref, ...] = ()
    first: int = 0
    """Its events in the trace: from `first`, up to `stop`."""
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """A module call returned."""

    call: int


@dataclass(slots=True)
class Trace:
    """A recorded forward pass."""

    events: list[Op | Exit] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    """Storage of each parameter to its first name."""
    refs: dict[str, Ref] = field(default_factory=dict)
    """Each parameter's place."""
    inputs: dict[str, Ref] = field(default_factory=dict)
    """Arguments of the model."""
    outputs: tuple[Ref, ...] = ()


class UnknownValueError(Exception):
    """Code looked at a number that is unknown on "meta"."""


class Recorder(TorchDispatchMode):
    """Records all operations while it is entered.

    Args:
        trace: is appended to.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.trace = trace
        self.stack: list[int] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._alive: list[Any] = []
        self._varying: set[int] = set()

    def ref(self, tensor: Tensor, *, with_value: bool = False) -> Ref:
        """The place of a tensor; its storage is kept alive, so that no other gets its number."""
        memory, width = tensor.untyped_storage(), tensor.element_size()
        key = (memory._cdata, width)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._alive.append(memory)
        number = self._numbers[key]
        integral = not tensor.is_floating_point() and not tensor.is_complex()
        known = with_value and integral and tensor.device.type != "meta" and number not in self._varying
        return Ref(
            storage=number,
            size=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()),
            capacity=memory.nbytes() // width,
            is_integral=integral and tensor.dtype is not torch.bool,
            value=tensor.clone() if known and tensor.numel() <= MOST_REAL_ELEMENTS else None,
        )

    def mark_varying(self, tensor: Tensor) -> Ref:
        """Say that a tensor's values depend on tokens or weights."""
        ref = self.ref(tensor)
        self._varying.add(ref.storage)
        return ref

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        tensors = tensors_in((args, kwargs))
        indexes = any(part in name for part in ("index", "gather", "scatter", "embedding"))

        def noted(value: Any) -> Any:
            return self.ref(value, with_value=indexes) if isinstance(value, Tensor) else value

        taken = mapped(args, noted), mapped(kwargs, noted)
        varies = any(t.is_meta or self.ref(t).storage in self._varying for t in tensors)
        result = compute(func, name, args, kwargs, tensors)
        made = tensors_in(result)
        outputs = tuple(self.ref(value) for value in made)
        if varies:
            self._varying.update(out.storage for out in outputs)
        if tensors:
            op = Op(name, func, *taken, outputs, self.stack[-1] if self.stack else 0)
            self.trace.events.append(op)
        return result


@cache
def name_of(func: Any) -> str:
    """An operation's name, without its overload."""
    return str(func).rpartition(".")[0]


def compute(func: Any, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
    """Run an operation, of which some tensors may be on "meta" and others not.

    Raises: UnknownValueError if its result would be a number, or a shape, that only weights tell.
    """
    on_meta = any(t.is_meta for t in tensors)
    if is_factory(name) and (on_meta or _is_meta(kwargs.get("device"))):
        return _made_on_cpu(func, args, kwargs)
    if not on_meta:
        return func(*args, **{key: value for key, value in kwargs.items() if not _is_meta(value)})
    if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"):
        raise UnknownValueError(f"{name} of a tensor that depends on weights")
    target = tensors[0]
    if name.endswith("_") and not target.is_meta:
        return target  # what is written is unknown; where it is written is recorded
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("meta")}

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_meta:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value

    if not all(t.is_meta for t in tensors):
        args, kwargs = mapped(args, moved), mapped(kwargs, moved)
    result = run_on_meta(func, args, kwargs)
    if name not in CHOICES:
        return result
    dim = kwargs.get("dim", next((a for a in args[2 if name == "aten.topk" else 1 :] if type(a) is int), -1))
    return mapped(result, lambda value: _made_up(value, target.shape[dim] if target.ndim else 1))


CHOICES = frozenset(f"aten.{name}" for name in ("topk", "sort", "argsort", "argmax", "argmin", "max", "min"))
"""Operations that return places: numbers that code may look at, while what decides over them is unknown."""

_FACTORIES = ("zeros", "ones", "full", "empty", "arange", "eye", "scalar_tensor", "linspace", "rand", "randn")


def is_factory(name: str) -> bool:
    """Whether an operation makes a tensor of given numbers."""
    stem = name.removeprefix("aten.")
    return stem.removeprefix("new_").removesuffix("_like") in _FACTORIES


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "meta"


def _made_up(value: Any, size: int) -> Any:
    """Places along a dimension: different ones in a row, and from row to row."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype is torch.bool:
        return value
    return (torch.arange(value.numel(), dtype=value.dtype) % size).view(value.shape)


def _made_on_cpu(func: Any, args: Any, kwargs: Any) -> Tensor:
    """What makes a tensor, made with values, unless it is large."""
    made: Tensor = func(*args, **(kwargs | {"device": torch.device("meta")}))
    if made.numel() <= MOST_REAL_ELEMENTS:
        made = func(*args, **(kwargs | {"device": torch.device("cpu")}))
    return made


def watch(recorder: Recorder, module: nn.Module) -> None:
    """Have every call of a module and those in it recorded. For a copy: the hooks stay."""
    for name, inner in module.named_modules():
        signature = inspect.signature(inner.forward)

        def enter(
            _: nn.Module, args: Any, kwargs: Any, name: str = name, signature: inspect.Signature = signature
        ) -> None:
            trace, stack = recorder.trace, recorder.stack
            try:
                bound: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
            except TypeError:
                bound = {}
            given = {
                argument: mapped(value, lambda v: recorder.ref(v) if isinstance(v, Tensor) else ...)
                for argument, value in bound.items()
            }
            call = Call(name, stack[-1] if stack else None, given, first=len(trace.events))
            trace.calls.append(call)
            stack.append(len(trace.calls) - 1)

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            trace = recorder.trace
            number = recorder.stack.pop()
            call = trace.calls[number]
            call.outputs = tuple(recorder.ref(v) for v in tensors_in(output))
            trace.events.append(Exit(number))
            call.stop = len(trace.events)

        inner.register_forward_pre_hook(enter, with_kwargs=True)
        inner.register_forward_hook(leave, with_kwargs=True)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """What is in lists, tuples and mappings, changed one by one."""
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return change(value)


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in lists, tuples and mappings, records of outputs such as Transformers returns among them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]

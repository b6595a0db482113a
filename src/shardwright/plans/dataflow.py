"""What every layer of a model computes from: which parameters, and which other layers, by which arguments.

A copy of the model runs a few tokens with its parameters on "meta", where it costs nothing whatever its size, and every
operation notes what it read and what it wrote. So it is known what a layer is given by the layers before it, by the
embedding, or by nothing but positions, without a name being looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from shardwright.errors import PlanError
from shardwright.foreign_errors import described
from shardwright.plans.flow.record import compute, name_of, tensors_in
from shardwright.plans.flow.skeleton import MOST_REAL_BYTES, copied
from shardwright.plans.nested import Form, Path, rebuilt, tensors_with_paths

NUM_TOKENS = 13
"""Of the pass: a number that is unlikely to be a size of the model."""


@dataclass(frozen=True, slots=True)
class Node:
    """Something that was computed, or a parameter."""

    parents: tuple[int, ...] = ()
    """What it was computed from."""
    layer: int | None = None
    """The layer that computed it; None: code outside of the layers."""


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that a layer was given."""

    before: tuple[int, ...]
    """What it was computed from."""
    node: int
    """What it is from here on: what is handed over can take its place."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer, called once."""

    name: str
    given: Any
    """Its arguments, (args, kwargs), with forms in place of tensors."""
    returned: Any
    """Its output, as `given`; what is neither tensor nor plain value is left out."""
    arguments: Mapping[Path, Argument]
    """Tensors among its arguments, parameters and buffers left out."""


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """A call of a module outside of the layers that has parameters of its own."""

    name: str
    given: Any
    returned: Any
    nodes: tuple[int, ...]
    """Tensors in its output."""


@dataclass(frozen=True, kw_only=True)
class Dataflow:
    """What one forward pass showed."""

    layers: tuple[str, ...]
    nodes: Sequence[Node]
    parameters: Mapping[str, int]
    """By every name that one has."""
    calls: Sequence[LayerCall]
    modules: Sequence[ModuleCall]
    start: int
    """The first node that came after the call of the first layer."""
    logits: tuple[int, ...]
    """What the output is computed from."""
    gives_last_alone: bool
    """The output has logits of the last token only."""
    writes_between: bool
    """Code between the layers writes into tensors in place."""


@torch.no_grad()
def trace_dataflow(module: nn.Module, layers: Sequence[str]) -> Dataflow:
    """Run a few tokens through a copy of a model, and see what depends on what.

    Args:
        module: the whole model, on "meta" or not; not changed.
        layers: qualified names, in the order in which they should run.

    Raises: PlanError if its code fails, or does not call the layers once each and in order.
    """
    for on_meta in (True, False):
        tracer = _Tracer(copied(module, on_meta=on_meta).eval(), layers)
        try:
            with torch.compiler.set_stance("force_eager"):
                return tracer.run()
        except PlanError:
            raise
        except Exception as exc:  # the code is the user's, and may look at values that only weights tell
            is_last = not on_meta or sum(p.numel() for p in module.parameters()) * 4 > MOST_REAL_BYTES
            if is_last:
                raise PlanError(f"the model's forward pass fails while it is looked at: {described(exc)}") from exc
    raise AssertionError("the last pass returns or raises")


@dataclass(eq=False)
class _Tracer(TorchDispatchMode):
    """Runs a module, and notes every operation."""

    module: nn.Module
    layers: Sequence[str]
    nodes: list[Node] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    writes_between: bool = False

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of_tensor: Any = WeakTensorKeyDictionary()
        self._written: dict[int, int] = {}  # storage to what was last written into it in place
        self._running: int | None = None
        self._start: int | None = None
        self._paused = False
        self.parameters: dict[str, int] = {}
        self._held: set[int] = {id(tensor) for tensor in self.module.buffers()}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter not in self._of_tensor:
                self._of_tensor[parameter] = self._node(())
                self._held.add(id(parameter))
            self.parameters[name] = self._of_tensor[parameter]

    def run(self) -> Dataflow:
        """Run the module, and put together what was seen."""
        places = {id(self.module.get_submodule(name)): index for index, name in enumerate(self.layers)}
        if len(places) != len(self.layers):
            raise PlanError("a module stands for more than one layer: a pipeline cannot be cut between its calls")
        within = tuple(f"{name}." for name in self.layers)
        for name, owner in self.module.named_modules():
            if (index := places.get(id(owner))) is not None:
                owner.forward = self._layer(index, owner.forward)
            elif name and owner._parameters and not name.startswith(within):
                owner.forward = self._module(name, owner.forward)
        tokens = torch.ones(1, NUM_TOKENS, dtype=torch.int64)  # zero may stand for padding
        with self:
            output = self.module(tokens, **without_cache(self.module))
        called = [call.name for call in self.calls]
        if called != list(self.layers):
            raise PlanError(_other_order(self.layers, called))
        logits = _logits(output)
        return Dataflow(
            layers=tuple(self.layers),
            nodes=self.nodes,
            parameters=self.parameters,
            calls=self.calls,
            modules=self.modules,
            start=self._start or 0,
            logits=tuple(sorted({node for tensor in logits for node in self._nodes_of(tensor)})),
            gives_last_alone=bool(logits) and logits[0].ndim > 1 and logits[0].shape[-2] == 1,
            writes_between=self.writes_between,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = tensors_in((args, kwargs))
        result = compute(func, name_of(func), args, kwargs, read)
        if self._paused:
            return result
        written = tensors_in(result)
        parents = tuple(sorted({node for tensor in read for node in self._nodes_of(tensor)}))
        storages = {_storage(tensor) for tensor in read}
        for tensor in written:
            if _storage(tensor) not in storages:
                self._written.pop(_storage(tensor), None)  # memory that was another's before
        if not parents and self._running is None:
            return result
        identities = {id(tensor) for tensor in read}
        node = self._node(parents)
        for tensor in written:
            self._of_tensor[tensor] = node
            if id(tensor) in identities:
                self._written[_storage(tensor)] = node
                self.writes_between |= self._running is None and bool(self.calls)
        return result

    def _layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._running is not None:
                raise PlanError(f"{self.layers[index]} runs inside of {self.layers[self._running]}")
            self._start = len(self.nodes) if self._start is None else self._start
            given = (args, kwargs)
            template, arguments = _template(given), self._take_arguments(given)
            self._running = index
            try:
                output = forward(*args, **kwargs)
            finally:
                self._running = None
            output = self._given_away(output, index)
            self.calls.append(LayerCall(self.layers[index], template, _template(output), arguments))
            return output

        return run

    def _given_away(self, output: Any, layer: int) -> Any:
        """A layer's output with tensors that nobody else holds: what the layer keeps of it stays on its stage."""
        if isinstance(output, Tensor):
            if id(output) in self._held:
                return output
            with self._pause():
                given = output.view_as(output)
            self._of_tensor[given] = self._node(self._nodes_of(output), layer)
            return given
        if isinstance(output, tuple):
            return rebuilt(output, [self._given_away(item, layer) for item in output])
        if isinstance(output, list | MutableMapping):
            for key in range(len(output)) if isinstance(output, list) else list(output):
                output[key] = self._given_away(output[key], layer)
        return output

    def _module(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            template = _template((args, kwargs))
            output = forward(*args, **kwargs)
            if self._running is None:
                nodes = []
                for _, tensor in tensors_with_paths(output):
                    nodes.append(self._node(self._nodes_of(tensor)))
                    if id(tensor) not in self._held:
                        self._of_tensor[tensor] = nodes[-1]
                self.modules.append(ModuleCall(name, template, _template(output), tuple(nodes)))
            return output

        return run

    def _take_arguments(self, given: Any) -> dict[Path, Argument]:
        """Give every argument memory of its own, as it has when it comes from another stage."""
        arguments = {}
        for path, tensor in tensors_with_paths(given):
            before = self._nodes_of(tensor)
            if id(tensor) in self._held or not before:
                continue
            with self._pause():
                tensor.set_(tensor.clone())  # type: ignore[call-overload]
            self._written.pop(_storage(tensor), None)
            self._of_tensor[tensor] = node = self._node(before)
            arguments[path] = Argument(before, node)
        return arguments

    def _node(self, parents: tuple[int, ...], layer: int | None = None) -> int:
        self.nodes.append(Node(parents, self._running if layer is None else layer))
        return len(self.nodes) - 1

    def _nodes_of(self, tensor: Tensor) -> tuple[int, ...]:
        own = self._of_tensor.get(tensor)
        written = self._written.get(_storage(tensor))
        if own is None:
            return () if written is None else (written,)
        return (own,) if written is None or written <= own else (own, written)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def without_cache(module: nn.Module) -> dict[str, bool]:
    """Arguments that keep a model from making a cache, if it has one."""
    parameters = inspect.signature(module.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


def _template(value: Any) -> Any:
    """A value with forms in place of tensors, and nothing in place of objects."""
    if isinstance(value, Tensor):
        return Form(tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return {key: _template(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_template(item) for item in value]
    if isinstance(value, tuple):
        return rebuilt(value, [_template(item) for item in value])
    return value if isinstance(value, bool | int | float | str) else None


def _logits(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return [output["logits"]]
    return [tensor for _, tensor in tensors_with_paths(output)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _other_order(layers: Sequence[str], called: Sequence[str]) -> str:
    """What is wrong with the order of calls."""
    rule = "a pipeline needs layers that run once each, in order"
    if missing := [name for name in layers if name not in called]:
        return f"{missing[0]} never runs: {rule}"
    if repeated := next((name for name in layers if called.count(name) > 1), None):
        return f"{repeated} runs {called.count(repeated)} times in one forward pass: {rule}"
    wrong = next(name for name, expected in zip(called, layers, strict=True) if name != expected)
    return f"{wrong} runs before layers that stand before it: {rule}"

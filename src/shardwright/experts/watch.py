"""Watch a block of experts run: every tensor operation, and which of them make what an expert gives.

Modules beside the experts are noted as a whole: a router's linear or a shared expert runs later on as it does now,
whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import UnsupportedModelError
from shardwright.experts.families import ParameterPlaces, Slot
from shardwright.layers.cpu_linears import plain_linears
from shardwright.replay.affine import is_view, tensors_in
from shardwright.replay.trace import Noted, SeenCall, SeenTensor, TraceMode

INPUT = "input"

Key = tuple[int, int]
"""A tensor that a pass makes: the number of the call, and its place among the call's outputs. (-1, 0) is the input."""


@dataclass(frozen=True, slots=True)
class RunModule(Noted):
    """A module of the block runs; arguments are its own."""

    name: str


@dataclass(slots=True)
class Visit:
    """One time that an expert is run."""

    expert: int
    calls: dict[Slot, int] = field(default_factory=dict)
    """Which call takes each of its parameters."""

    @property
    def first(self) -> int:
        return min(self.calls.values())

    @property
    def last(self) -> int:
        return max(self.calls.values())


@dataclass(frozen=True, slots=True)
class Interference:
    """What a pass does to the numbers, to learn from what changes."""

    silences: bool = False
    """Experts give zeros."""
    forced: tuple[Key, Tensor] | None = None
    """A tensor that gets other numbers when it is made."""
    kept_after: Mapping[int, int] = field(default_factory=dict)
    """Storages that are copied after a call, by its number."""


class BlockMode(TraceMode):
    """Notes what a block does while it is active.

    Args:
        input: of the block.
        places: of the experts' parameters.
        slots: those parameters that make an expert; None: not known yet, then no visits are told apart.
        interference: with the numbers.
    """

    def __init__(
        self,
        input: Tensor,
        places: ParameterPlaces,
        slots: frozenset[Slot] | None = None,
        interference: Interference | None = None,
    ) -> None:
        super().__init__(input.shape[:-1].numel())
        self.visits: list[Visit] = []
        self.used: set[Slot] = set()
        """Slots whose parameters some call takes."""
        self.outputs: list[list[Tensor]] = []
        """Tensors that each call gives."""
        self.kept: dict[int, Tensor] = {}
        """Copies of storages, by the number of the call after which they were made."""
        self.result: Any = None
        """What the block returns."""
        self._places = places
        self._slots = slots
        self._interference = interference or Interference()
        self._open: dict[int, Visit] = {}
        self.trace.inputs[INPUT] = self.look_at(input).storage
        self.input = input

    def tensor(self, key: Key) -> Tensor:
        """A tensor of the pass, as it is at its end."""
        return self.input if key[0] < 0 else self.outputs[key[0]][key[1]]

    def slot_of(self, seen: SeenTensor) -> tuple[int, Slot] | None:
        """Which expert's parameter a tensor is."""
        storage = self.trace.tensors[seen.storage].untyped_storage()
        numel = torch.Size(seen.sizes).numel()
        return self._places.find(storage.data_ptr() + seen.offset * seen.dtype.itemsize, numel)

    def _add(self, call: SeenCall, output: Any) -> None:
        super()._add(call, output)
        tensors = tensors_in(output, Tensor)
        self.outputs.append(tensors)
        number = len(self.outputs) - 1
        with self.muted():
            self._visit(call, number, tensors)
            if self._interference.forced is not None and self._interference.forced[0][0] == number:
                (_, leaf), values = self._interference.forced
                tensors[leaf].copy_(values.view_as(tensors[leaf]))
            if number in self._interference.kept_after:
                storage = self._interference.kept_after[number]
                self.kept[number] = self.trace.tensors[storage].clone()

    def _visit(self, call: SeenCall, number: int, tensors: list[Tensor]) -> None:
        arguments = tensors_in((call.args, call.kwargs), SeenTensor)
        found = [place for place in map(self.slot_of, arguments) if place is not None]
        if not found or is_view(call, {t.storage for t in arguments}, {t.storage for t in _outputs(call)}):
            return
        self.used |= {slot for _, slot in found}
        if len({expert for expert, _ in found}) > 1:
            raise UnsupportedModelError("its code takes the weights of several experts together")
        if self._slots is None:
            return
        expert = found[0][0]
        visit = self._open.setdefault(expert, Visit(expert))
        if any(slot in visit.calls for _, slot in found):
            raise UnsupportedModelError("its code uses a weight of an expert twice")
        visit.calls |= {slot: number for _, slot in found}
        if visit.calls.keys() == self._slots:
            self.visits.append(self._open.pop(expert))
            if self._interference.silences:
                tensors[0].zero_()


def _outputs(call: SeenCall) -> list[SeenTensor]:
    return tensors_in(call.output, SeenTensor)


def watch_block(
    block: nn.Module,
    run: Callable[[Tensor], Any],
    input: Tensor,
    places: ParameterPlaces,
    slots: frozenset[Slot] | None = None,
    interference: Interference | None = None,
) -> BlockMode:
    """One pass of a block.

    Args:
        block: that runs.
        run: calls it as its model does.
        input: [..., width], the block's own to write over.
        places: of the experts' parameters.
        slots, interference: as of BlockMode.

    Raises: what the block's code raises; UnsupportedModelError if its experts cannot be told apart.
    """
    mode = BlockMode(input, places, slots, interference)
    with plain_linears(block), noted_modules(block, places, mode), mode:
        mode.result = run(input)
    return mode


@contextmanager
def noted_modules(block: nn.Module, places: ParameterPlaces, mode: TraceMode) -> Iterator[None]:
    """While open, modules of a block that hold parameters, but none of the experts', are noted as a whole."""
    changed: dict[nn.Module, Any] = {}
    for name, module in block.named_modules():
        held = list(module.parameters())
        if module is block or not held or any(places.begins(p.data_ptr()) for p in held):
            continue
        changed[module] = module.__dict__.get("forward")
        module.__dict__["forward"] = _noting(RunModule(name), module.forward, mode)
    try:
        yield
    finally:
        for module, forward in changed.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _noting(function: RunModule, forward: Callable[..., Any], mode: TraceMode) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if mode.is_muted:
            return forward(*args, **kwargs)
        return mode.note(function, args, lambda: forward(*args, **kwargs), **kwargs)

    return run

"""A block of experts without its loop: what its code does before and after, and all experts in between at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from shardwright.adapt.stand_in import StandIn
from shardwright.errors import UnsupportedModelError
from shardwright.experts.body import GroupedBody, run_chosen
from shardwright.experts.region import Cut, Region
from shardwright.experts.routing import Routing, Weighting, mix, pick
from shardwright.experts.steps import Step, Steps, Storages, View, viewed
from shardwright.experts.watch import INPUT, BlockMode, RunModule
from shardwright.layers.collectives import Collectives
from shardwright.replay.affine import Call, Place, common, common_call, common_constant, tensors_in
from shardwright.replay.trace import Noted, SeenCall, SeenTensor, mapped

LENGTHS_KEPT = 64
"""Numbers of tokens for which the steps are kept."""


@dataclass(frozen=True, slots=True)
class MixExperts(Noted):
    """All experts: arguments are the rows [T, in], the choices [T, k], weights or None, and what they are added to."""

    weighting: Weighting
    is_in_place: bool
    """Whether they are written into what they are added to."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a block computes, for any number of tokens, with experts all at once."""

    calls: list[Call]
    input: Place
    results: list[Any]
    """Leaves of what it returns; tensors are Place."""
    result_spec: Any
    constants: dict[Place, tuple[str, int] | Tensor]
    """What is there before: a parameter or buffer of the block and where in it, in elements; or a tensor."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A pass, and where in it experts have become one tensor."""

    mode: BlockMode
    region: Region
    cut: Cut


def outline_of(block: nn.Module, passes: Sequence[Watched], routing: Routing, added_to: Any) -> Outline:
    """What passes of different numbers of tokens have in common, but for the experts.

    Args:
        block: that ran.
        passes: three or more.
        routing: of the experts.
        added_to: key of the tensor that experts are added to, where they are not added in place; None: they stand
            alone.

    Raises: UnsupportedModelError if passes are not alike.
    """
    lengths = [watched.mode.trace.num_tokens for watched in passes]
    slices = [_sliced(watched, routing, added_to) for watched in passes]
    if len({len(part.calls) for part in slices}) > 1:
        raise UnsupportedModelError("its code does not do the same for every number of tokens")
    calls = [common_call([part.calls[i] for part in slices], lengths) for i in range(len(slices[0].calls))]
    results = common([part.results for part in slices], lengths)
    input = common([replace(watched.region.seen((-1, 0)), storage=0) for watched in passes], lengths)
    return Outline(calls, input, results, passes[0].region.result_spec, _constants_of(block, calls, results, slices))


@dataclass(frozen=True, slots=True)
class _Slice:
    """What a pass's results depend on."""

    calls: list[SeenCall]
    results: list[Any]
    tensors: list[Tensor]
    """One of each storage, by its new number; the input's is 0."""


def _constants_of(
    block: nn.Module, calls: list[Call], results: list[Any], slices: Sequence[_Slice]
) -> dict[Place, tuple[str, int] | Tensor]:
    """Where the tensors come from that no call makes."""
    made = {0}
    found: dict[Place, tuple[str, int] | Tensor] = {}
    held = [*block.named_parameters(), *block.named_buffers()]
    for call in calls:
        read: list[Place] = tensors_in((call.args, call.kwargs), Place)
        found |= {p: _constant(held, p, slices) for p in read if p.storage not in made}
        made |= {p.storage for p in tensors_in(call.output, Place)} - {p.storage for p in found}
    found |= {p: _constant(held, p, slices) for p in tensors_in(results, Place) if p.storage not in made}
    return found


def _constant(held: list[tuple[str, Tensor]], place: Place, slices: Sequence[_Slice]) -> tuple[str, int] | Tensor:
    if any(number.slope for number in (*place.sizes, *place.strides, place.offset)):
        raise UnsupportedModelError("its code takes more of a tensor that it keeps the more tokens there are")
    tensors = [part.tensors[place.storage] for part in slices]
    address = tensors[0].untyped_storage().data_ptr() + place.offset.base * place.dtype.itemsize
    for name, tensor in held:
        if tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes:
            return name, (address - tensor.data_ptr()) // place.dtype.itemsize
    tensor = common_constant(tensors)
    return tensor.as_strided(*place.at(0)).clone()


def _sliced(watched: Watched, routing: Routing, added_to: Any) -> _Slice:
    """The calls of a pass that its results depend on, with one call for all experts; storages are numbered anew."""
    region, cut = watched.region, watched.cut
    made = region.seen(region.makers[cut.storage])
    if not cut.is_added and (made.offset or not _is_contiguous(made)):
        raise UnsupportedModelError("what its experts give is laid out in memory in a way of its own")
    base = made if cut.is_added else None if added_to is None else region.seen(added_to)
    keys = (routing.rows, routing.chosen, routing.weights)
    arguments = (*(None if key is None else region.seen(key) for key in keys), base)
    mixed = SeenCall(MixExperts(routing.weighting, cut.is_added), arguments, {}, made)
    live, calls = region.wanted, []
    for number in range(len(region.calls) - 1, -1, -1):
        if number == cut.after:
            calls.append(mixed)
            live = live - {cut.storage} | {t.storage for t in tensors_in(arguments, SeenTensor)}
        if number <= cut.after and region.depends[number]:
            continue
        if region.has_effect(number, live):
            calls.append(region.calls[number])
            live = live | region.reads[number]
    numbers = {watched.mode.trace.inputs[INPUT]: 0}

    def renumbered(seen: SeenTensor) -> SeenTensor:
        return replace(seen, storage=numbers.setdefault(seen.storage, len(numbers)))

    renamed = [
        SeenCall(c.function, *(mapped(tree, SeenTensor, renumbered) for tree in (c.args, c.kwargs, c.output)))
        for c in reversed(calls)
    ]
    results = mapped(region.results, SeenTensor, renumbered)
    return _Slice(renamed, results, [watched.mode.trace.tensors[number] for number in numbers])


def _is_contiguous(seen: SeenTensor) -> bool:
    return torch.empty(seen.sizes, device="meta").stride() == seen.strides


class Program:
    """Runs an outline.

    Args:
        outline: of a block.
        block: whose parameters and modules it uses: the one that was watched, or another of its kind.
        body: of the block's experts.
        num_experts: of them.

    Raises: UnsupportedModelError if the block has not the parameters.
    """

    def __init__(self, outline: Outline, block: nn.Module, body: GroupedBody, *, num_experts: int) -> None:
        self._outline = outline
        self._modules = {
            call.function.name: block.get_submodule(call.function.name)
            for call in outline.calls
            if isinstance(call.function, RunModule)
        }
        self._body = body
        self._num_experts = num_experts
        self.sums: Collectives | None = None
        """Adds up what experts give over the ranks that hold parts of them; None: they are whole."""
        held = dict([*block.named_parameters(), *block.named_buffers()])
        self._constants = {
            place: found if isinstance(found, Tensor) else _view_of(held[found[0]].detach(), place, found[1])
            for place, found in outline.constants.items()
        }
        self._steps = lru_cache(LENGTHS_KEPT)(self._make_steps)

    def run(self, input: Tensor) -> Any:
        """What the block returns.

        Args:
            input: [..., width], of as many dimensions as were watched; tokens are taken one after another.
        """
        num_tokens = input.shape[:-1].numel()
        first, steps, leaves = self._steps(num_tokens)
        storages: Storages = {first.storage: (input.reshape(first.sizes).contiguous(), first)}
        steps.run(storages, self._carry_out)
        results = [viewed(leaf, storages) if isinstance(leaf, View) else leaf for leaf in leaves]
        if input.shape != first.sizes:
            tokens = first.sizes[:-1]
            results = [
                r.reshape(*input.shape[:-1], *r.shape[len(tokens) :])
                if isinstance(r, Tensor) and r.shape[: len(tokens)] == tokens
                else r
                for r in results
            ]
        return _pytree.tree_unflatten(results, self._outline.result_spec)

    def blank(self, input: StandIn) -> Any:
        """What the block returns of tokens that nobody computes."""
        _, _, leaves = self._steps(input.shape[:-1].numel())
        results = [
            StandIn.like(torch.empty(leaf.sizes, dtype=leaf.dtype, device="meta")) if isinstance(leaf, View) else leaf
            for leaf in leaves
        ]
        return _pytree.tree_unflatten(results, self._outline.result_spec)

    def _make_steps(self, num_tokens: int) -> tuple[View, Steps, list[Any]]:
        outline = self._outline
        leaves = mapped(outline.results, Place, lambda p: self._constants.get(p, View.of(p, num_tokens)))
        steps = Steps(outline.calls, num_tokens, self._constants)
        return View.of(outline.input, num_tokens), steps, leaves

    def _carry_out(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(step.function, RunModule):
            return self._modules[step.function.name](*args, **kwargs)
        if isinstance(step.function, MixExperts):
            return self._mix(step, *args)
        return step.function(*args, **kwargs)

    def _mix(self, step: Step, rows: Tensor, chosen: Tensor, weights: Tensor | None, base: Tensor | None) -> Tensor:
        function, (view,) = step.function, step.outputs
        num_tokens = rows.shape[:-1].numel()
        chosen = chosen.reshape(num_tokens, -1)
        if weights is not None:
            weights = pick(chosen, weights.reshape(num_tokens, -1), function.weighting)
        given, places = run_chosen(self._body, rows.reshape(num_tokens, -1), chosen, self._num_experts)
        output = mix(given, places, weights).to(view.dtype).view(view.sizes)
        if self.sums is not None:
            output = self.sums.all_reduce(output)
        if base is None:
            return output
        return base.add_(output) if function.is_in_place else output + base.view(view.sizes)


def _view_of(tensor: Tensor, place: Place, start: int) -> Tensor:
    sizes, strides, _ = place.at(0)
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + start)

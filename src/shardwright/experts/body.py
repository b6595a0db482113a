"""What one expert computes, as a loop over experts showed it, and the same for rows of all experts at once.

Products with an expert's matrix become grouped ones, what is added or multiplied by its vectors is looked up for each
row, and everything else (activations, gates) treats rows alike: that it does is shown by numbers, as all of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.experts.families import Slot
from shardwright.experts.steps import Step, Steps, Storages, View, viewed
from shardwright.experts.watch import BlockMode, Visit
from shardwright.layers.grouped_linear import ExpertMatrices, group_by_expert
from shardwright.replay.affine import Call, Place, common, common_call, is_view, tensors_in
from shardwright.replay.trace import SeenCall, SeenTensor, mapped

aten = torch.ops.aten

WEIGHT = {aten.linear.default: 1, aten.mm.default: 1, aten.addmm.default: 2, aten.bmm.default: 1}
"""Which argument of a product is the matrix."""
BIAS = {aten.linear.default: 2, aten.addmm.default: 0}
ROWS = {aten.linear.default: 0, aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}

ROWS_AT_ONCE = 256
"""On a CPU: what experts make of more rows would not stay in its cache from one operation to the next."""

LENGTHS_KEPT = 16
"""Numbers of rows for which the steps are kept."""


@dataclass(frozen=True, slots=True)
class ExpertView:
    """A view of an expert's parameter."""

    slot: Slot
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Body:
    """What an expert computes of rows [n, in], for any n."""

    calls: list[Call]
    """Tensors in them are Place, with the rows in storage 0, or ExpertView."""
    input: Place
    output: Place

    @property
    def last_slots(self) -> set[Slot]:
        """Parameters of the last product, and of what comes after it."""
        uses = [{v.slot for v in tensors_in((c.args, c.kwargs), ExpertView)} for c in self.calls]
        last = max(number for number, call in enumerate(self.calls) if call.function in WEIGHT and uses[number])
        return set().union(*uses[last:])


def body_of(modes: Sequence[BlockMode]) -> Body:
    """What experts compute, by what they did with several numbers of rows.

    Args:
        modes: passes of different numbers of tokens.

    Raises: UnsupportedModelError if experts do not do the same, or something that is no chain of products.
    """
    by_rows: dict[int, tuple[list[SeenCall], SeenTensor, SeenTensor]] = {}
    for mode in modes:
        for visit in mode.visits:
            seen = _calls_of(mode, visit)
            by_rows.setdefault(torch.Size(seen[1].sizes[:-1]).numel(), seen)
    if len(by_rows) < 3:
        raise UnsupportedModelError("its experts were not seen with enough numbers of tokens")
    lengths = sorted(by_rows)[-3:]
    found = [by_rows[length] for length in lengths]
    if len({len(calls) for calls, _, _ in found}) > 1:
        raise UnsupportedModelError("its experts do not all compute the same")
    calls = [common_call([calls[i] for calls, _, _ in found], lengths) for i in range(len(found[0][0]))]
    return Body(calls, *(common([item[i] for item in found], lengths) for i in (1, 2)))


def _calls_of(mode: BlockMode, visit: Visit) -> tuple[list[SeenCall], SeenTensor, SeenTensor]:
    """Calls of a visit that the output depends on, its rows and its output; storages numbered from the rows on."""
    made: set[int] = set()
    kept: list[SeenCall] = []
    inputs: set[SeenTensor] = set()

    for number in range(visit.first, visit.last + 1):
        call = mode.trace.calls[number]
        reads: list[SeenTensor] = tensors_in((call.args, call.kwargs), SeenTensor)
        makes = {t.storage for t in tensors_in(call.output, SeenTensor)}
        is_of_visit = number in visit.calls.values() or any(t.storage in made for t in reads)
        if not is_of_visit or is_view(call, {t.storage for t in reads}, makes):
            continue
        made |= makes
        inputs |= {t for t in reads if t.storage not in made and mode.slot_of(t) is None}
        kept.append(call)
    if len(inputs) != 1:
        raise UnsupportedModelError("its experts compute of more than the rows of their tokens")
    (rows,) = inputs
    last = kept[-1].output
    if not isinstance(last, SeenTensor):
        raise UnsupportedModelError("its experts give more than one tensor")
    numbers = {rows.storage: 0}

    def named(seen: SeenTensor) -> Any:
        if (place := mode.slot_of(seen)) is not None:
            return ExpertView(place[1], seen.sizes, seen.strides)
        if seen.storage == rows.storage:  # the rows may be some of those of a larger tensor
            return replace(seen, storage=0, offset=seen.offset - rows.offset)
        return replace(seen, storage=numbers.setdefault(seen.storage, len(numbers)))

    renamed = [
        SeenCall(call.function, *(mapped(tree, SeenTensor, named) for tree in (call.args, call.kwargs, call.output)))
        for call in kept
    ]
    return renamed, named(rows), named(last)


Carried = Callable[[Step, tuple[Any, ...], Tensor, Tensor], Tensor]
"""Carries out a call with experts' parameters: for its step, its arguments, the expert of each row, and where rows of
each end."""


class GroupedBody:
    """The body of all experts of a block.

    Args:
        body: of one expert.
        parameters: by slot, of each expert.
        packed: as of ExpertMatrices.

    Raises: UnsupportedModelError if it does something with parameters that is not known for rows of several experts.
    """

    def __init__(self, body: Body, parameters: dict[Slot, list[Tensor]], packed: Mapping[int, Tensor] | None) -> None:
        self._packed = packed
        self._body = body
        self._parameters = parameters
        self._carried = {
            number: self._carrier(call)
            for number, call in enumerate(body.calls)
            if tensors_in((call.args, call.kwargs), ExpertView)
        }
        self._steps = lru_cache(LENGTHS_KEPT)(self._make_steps)

    @property
    def in_features(self) -> int:
        """Of a row that goes in."""
        return self._body.input.sizes[-1].base

    @property
    def out_features(self) -> int:
        """Of a row that comes out."""
        return self._body.output.sizes[-1].base

    def run(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """What experts make of rows.

        Args:
            rows: [R, in], contiguous, in the order of experts.
            experts: [R] int64, of each row.
            ends: [E] int32, where the rows of each end.

        Returns: [R, out].
        """
        input, output, steps = self._steps(len(rows))
        storages: Storages = {input.storage: (rows.view(input.sizes), input)}

        def carry_out(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            carried = self._carried.get(step.number)
            return step.function(*args, **kwargs) if carried is None else carried(step, args, experts, ends)

        steps.run(storages, carry_out)
        return viewed(output, storages).reshape(len(rows), -1)

    def _make_steps(self, num_rows: int) -> tuple[View, View, Steps]:
        input, output = (View.of(place, num_rows) for place in (self._body.input, self._body.output))
        return input, output, Steps(self._body.calls, num_rows, {})

    def _carrier(self, call: Call) -> Carried:
        if call.function in WEIGHT and not call.kwargs:
            return self._product(call)
        views = tensors_in((call.args, call.kwargs), ExpertView)
        if torch.Tag.pointwise not in call.function.tags or len(views) > 1 or not _is_vector(views[0]) or call.kwargs:
            raise UnsupportedModelError(f"its experts use their weights in {call.function}")
        vectors = self._vectors(views[0])

        def by_row(step: Step, args: tuple[Any, ...], experts: Tensor, ends: Tensor) -> Tensor:
            result: Tensor = step.function(*mapped(args, ExpertView, lambda _: vectors[experts]))
            return result

        return by_row

    def _product(self, call: Call) -> Carried:
        weight, rows = call.args[WEIGHT[call.function]], ROWS[call.function]
        place = BIAS.get(call.function)
        bias = call.args[place] if place is not None and place < len(call.args) else None
        if not isinstance(weight, ExpertView) or not isinstance(call.args[rows], Place):
            raise UnsupportedModelError("its experts multiply their weights by something else than rows of tokens")
        matrices = [p.as_strided(weight.sizes[-2:], weight.strides[-2:]) for p in self._parameters[weight.slot]]
        if call.function is aten.linear.default:
            matrices = [matrix.mT for matrix in matrices]
        experts_matrices = ExpertMatrices(matrices, self._packed)
        vectors = self._vectors(bias) if isinstance(bias, ExpertView) else None
        if bias is not None and vectors is None:
            raise UnsupportedModelError("its experts share a bias")

        def product(step: Step, args: tuple[Any, ...], experts: Tensor, ends: Tensor) -> Tensor:
            given = args[rows]
            output = experts_matrices.multiply(given.reshape(-1, given.shape[-1]), ends)
            if vectors is not None:
                output += vectors[experts]
            return output.view(step.outputs[0].sizes)

        return product

    def _vectors(self, view: ExpertView) -> Tensor:
        """[E, size]."""
        return torch.stack([p.flatten() for p in self._parameters[view.slot]])


def run_chosen(body: GroupedBody, rows: Tensor, chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """What experts make of the tokens that chose them.

    Args:
        body: of the experts.
        rows: [T, in].
        chosen: [T, k] integers, experts of each token.
        num_experts: of which they are chosen.

    Returns: [T * k, out] in an order of its own, and [T, k] int64: which of these rows is that of a choice.
    """
    tokens, experts, places, ends = group_by_expert(chosen, num_experts)
    piece = len(tokens) if rows.device.type != "cpu" else ROWS_AT_ONCE
    made = [
        body.run(rows[tokens[i : i + piece]], experts[i : i + piece], (ends - i).clamp_(0, len(tokens[i : i + piece])))
        for i in range(0, len(tokens), piece)
    ]
    return made[0] if len(made) == 1 else torch.cat(made), places.view(chosen.shape)


def _is_vector(view: ExpertView) -> bool:
    return torch.Size(view.sizes).numel() == view.sizes[-1]

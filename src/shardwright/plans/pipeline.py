"""Run one stage of a model.

The model's own forward runs on every stage, from its first line. Layers of earlier stages pass through what they are
given, and modules before the layers whose parameters are elsewhere give numbers of no meaning; where the stage's first
layer begins, what the stage before hands over takes the place of all that. Where the first layer of the next stage
would begin, what that is given is sent on, and the forward is left.

    stage 0     embedding  L0 L1 ──────────┐ send
    stage 1     (nothing)  (through)  recv └► L2 L3 ──────────┐ send
    stage 2     (nothing)  (through)  (through)          recv └► L4 L5  norm, head ► logits

Positions, rotary tables and masks are computed anew on every stage. Caches are not handed over: every stage keeps those
of its own layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import PlanError, ShardwrightError
from shardwright.foreign_errors import described
from shardwright.plans.dataflow import Dataflow, LayerCall, ModuleCall, trace_dataflow
from shardwright.plans.handover import Handover, handover
from shardwright.plans.imitation import Imitation, has_forms
from shardwright.plans.links import (
    StageFinishedError,
    StageLink,
    receive,
    receive_finish,
    send_blank,
    send_failure,
    send_finish,
)
from shardwright.plans.nested import Path, tensor_at, with_tensors
from shardwright.plans.table import ShardTable


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What every stage must know of the whole model."""

    flow: Dataflow
    handovers: tuple[Handover, ...]
    """Per stage, what it needs; nothing for the first."""

    def sent_to(self, stage: int) -> Handover:
        """What a stage is sent: what it needs, and outputs of modules that it passes on to those behind it."""
        modules = dict.fromkeys(name for later in self.handovers[stage:] for name in later.modules)
        return Handover(self.handovers[stage].arguments, tuple(modules))


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What a stage's forward returns when there is another behind it."""

    gives_last_alone: bool
    """The model gives logits of the last token only."""
    given: Mapping[str, Any]
    """Arguments of the next stage's first layer, by name: caches that the model's code has made are among them."""


def plan_pipeline(module: nn.Module, table: ShardTable, *, flow: Dataflow | None = None) -> Pipeline:
    """Find out what the stages of a model hand over.

    Args:
        module: the whole model, on "meta" or not.
        table: its plan, resolved, with any number of stages.
        flow: of the model's layers, if it is at hand.

    Raises: PlanError if its code fails, does not run its layers once each and in order, or a stage needs what it cannot
        be given.
    """
    if flow is None:
        flow = trace_dataflow(module, [layer for stage in table.stages for layer in stage.layers])
    handovers: list[Handover] = []
    sent: tuple[Path, ...] = ()
    last = len(flow.layers)
    for stage in reversed(table.stages):
        held = {name for name, row in table.by_name.items() if stage.index in row.stages}
        first = last - len(stage.layers)
        handovers.insert(0, handover(flow, first, last, held, sent=sent))
        sent, last = handovers[0].arguments, first
    return Pipeline(flow=flow, handovers=tuple(handovers))


class PipelineStage:
    """One stage of a model, made of the model in place: from now on, its forward runs this stage alone.

    The forward of the last stage returns what the model's does, that of the others HandedOver. It raises
    StageFailedError if an earlier stage failed, and tells the next one of its own failures.

    Args:
        module: the whole model, or what `plans.shard.shard` made of it for a rank of this stage.
        pipeline: from `plan_pipeline`, of the whole model.
        table: that the pipeline was planned for.
        stage: number of this one.
        source: brings what the stage before hands over; None for the first stage.
        target: takes what this stage hands over; None for the last.
    """

    def __init__(
        self,
        module: nn.Module,
        pipeline: Pipeline,
        table: ShardTable,
        stage: int,
        *,
        source: StageLink | None,
        target: StageLink | None,
    ) -> None:
        assert (source is None, target is None) == (stage == 0, stage == table.pp - 1), "links to both neighbours"
        self._flow = flow = pipeline.flow
        self._source = source
        self._target = target
        self._source_has_finished = False
        self._arguments: dict[Path, Tensor] | None = None  # received in the forward that runs
        self._outputs: dict[str, Tensor] = {}  # of modules, received or made in the forward that runs
        first = sum(len(earlier.layers) for earlier in table.stages[:stage])
        last = first + len(table.stages[stage].layers)
        _drop_parameters(module, table, stage)
        if stage > 0:
            self._takes = pipeline.sent_to(stage)
            for call in flow.calls[:first]:
                module.get_submodule(call.name).forward = Imitation(call.given, call.returned, flow.writes_between)
            for other in flow.modules:
                if other.name in pipeline.handovers[stage].idle and has_forms(other.given):
                    module.get_submodule(other.name).forward = Imitation(other.given, other.returned, copies=True)
            for other in flow.modules:
                if other.name in pipeline.handovers[stage].modules:
                    module.get_submodule(other.name).forward = self._received_output(other)
            start = module.get_submodule(flow.layers[first])
            start.forward = self._starting(start.forward, flow.calls[first])
        if target is not None:
            self._gives = pipeline.sent_to(stage + 1)
            following = module.get_submodule(flow.layers[last])
            self._takes_next = inspect.signature(following.forward)
            following.forward = self._hand_over
            if stage == 0:
                for name in self._gives.modules:
                    maker = module.get_submodule(name)
                    maker.forward = self._remembering(name, maker.forward)
        module.forward = self._ending(module.forward)

    def settle(self) -> None:
        """End a series of forward passes that not every stage may have gone through to its end.

        Every stage calls it, whatever went wrong there. Afterwards nothing is on its way between them, and the next
        forward pass begins anew.
        """
        if self._target is not None:
            send_finish(self._target)
        if self._source is not None and not self._source_has_finished:
            receive_finish(self._source)
        self._source_has_finished = False

    def _ending(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, which ends where the next stage begins."""

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._arguments, self._outputs = None, {}
            try:
                output = forward(*args, **kwargs)
                if self._target is not None:
                    raise PlanError("its code does not run all layers that it ran when it was looked at")
            except _Left as left:
                return HandedOver(self._flow.gives_last_alone, left.given)
            except BaseException as exc:
                if self._target is not None:
                    send_failure(self._target, str(exc) if isinstance(exc, ShardwrightError) else described(exc))
                raise
            return output

        return run

    def _starting(self, forward: Callable[..., Any], call: LayerCall) -> Callable[..., Any]:
        """The forward of the stage's first layer, on what was handed over."""

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments, _ = self._receive()
            args, kwargs = with_tensors(call.given, (args, kwargs), arguments)
            return forward(*args, **kwargs)

        return run

    def _received_output(self, call: ModuleCall) -> Callable[..., Any]:
        """The forward of a module whose output is handed over."""
        imitation = Imitation(call.given, call.returned, copies=True)

        def run(*args: Any, **kwargs: Any) -> Any:
            _, outputs = self._receive()
            return outputs[call.name] if call.name in outputs else imitation(*args, **kwargs)

        return run

    def _remembering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a module whose output is handed over, where it is made."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._outputs[name] = output = forward(*args, **kwargs)
            return output

        return run

    def _receive(self) -> tuple[dict[Path, Tensor], dict[str, Tensor]]:
        """What the stage before hands over in this forward pass."""
        assert self._source is not None, "the first stage receives nothing"
        if self._arguments is None:
            try:
                with torch._C.DisableTorchFunction():
                    tensors = receive(self._source)
            except StageFinishedError:
                self._source_has_finished = True
                raise
            if tensors is None:
                self._arguments = {}
                return {}, {}
            num = len(self._takes.arguments)
            self._arguments = dict(zip(self._takes.arguments, tensors[:num], strict=True))
            self._outputs = dict(zip(self._takes.modules, tensors[num:], strict=True))
        return self._arguments, self._outputs

    def _hand_over(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the first layer of the next stage."""
        assert self._target is not None, "the last stage hands over nothing"
        given = by_name(self._takes_next, args, kwargs)
        names = self._gives.modules
        with torch._C.DisableTorchFunction():  # tensors that watch what is done to them were sent twice
            tensors = [tensor_at((args, kwargs), path).as_subclass(Tensor) for path in self._gives.arguments]
            if any(tensor.is_meta for tensor in tensors) or not all(name in self._outputs for name in names):
                send_blank(self._target)
            else:
                self._target.send([*tensors, *(self._outputs[name].as_subclass(Tensor) for name in names)])
        raise _Left(given)


class _Left(BaseException):  # no code of a model's author catches it
    """The forward ends here.

    Args:
        given: what the next layer was given.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = given


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; those that only have places are left out."""
    places = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return dict(zip(places, args, strict=False)) | dict(kwargs)


def _drop_parameters(module: nn.Module, table: ShardTable, stage: int) -> None:
    """Put something that takes no memory where parameters of other stages were, for code that asks for their type.

    Outside of the layers it also has their shape: modules there may run, to no avail.
    """
    within = tuple(f"{layer}." for one in table.stages for layer in one.layers)
    for row in table.parameters:
        if stage in row.stages:
            continue
        old = module.get_parameter(row.name)
        nothing = torch.zeros((), dtype=old.dtype, device=old.device).expand(row.shape)
        for name in (row.name, *row.aliases):
            owner, _, leaf = name.rpartition(".")
            held = module.get_submodule(owner)
            del held._parameters[leaf]
            setattr(held, leaf, nothing.new_empty(0) if name.startswith(within) else nothing)

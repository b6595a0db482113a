"""Pipeline stages: which layers run where."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.dataflow import Dataflow, trace_dataflow
from shardwright.plans.handover import needed_parameters, uncuttable
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.stack import LayerStack, find_stack, stack_in
from shardwright.plans.table import ParameterRow, Stage


def layer_stack(module: nn.Module, plan: ParallelPlan) -> LayerStack:
    """The layers that a pipeline is cut between: those of the plan's entry that holds any, else of the block that
    repeats.

    Raises: PlanError if the plan names a module that is not there, or nothing repeats.
    """
    stacks = [stack for name in plan.pp if (stack := stack_in(module, name)) is not None]
    stack = max(stacks, key=lambda s: len(s.layers), default=None) or find_stack(module)
    if stack is None:
        raise PlanError("the model has no block of layers that repeats: it cannot be cut into pipeline stages")
    return stack


def assign_stages(
    module: nn.Module,
    plan: ParallelPlan,
    rows: Sequence[ParameterRow],
    *,
    tp: int,
    pp: int,
    pp_split: Sequence[int] | None,
    flow: Dataflow | None = None,
) -> tuple[tuple[Stage, ...], list[ParameterRow]]:
    """Cut the layers into stages, and say of every parameter which of them hold it.

    What the plan's pipeline names before the layers goes to the first stage, what it names after them to the last;
    what it does not name at all is held by the stages that compute with it.

    Returns: stages, and the rows with theirs.
    Raises: PlanError.
    """
    names = tuple(name for name, _ in module.named_children())
    if pp == 1:
        return (Stage(index=0, modules=names, layers=()),), list(rows)
    stack = layer_stack(module, plan)
    before, after = _around(module, plan, stack)
    if flow is None or flow.layers != stack.layers:
        flow = trace_dataflow(module, stack.layers)
    num = len(stack.layers)
    weights = _bytes_of_layers(rows, stack.layers)
    head = _bytes_outside(rows, stack, needed_parameters(flow, 0, 1))
    tail = _bytes_outside(rows, stack, needed_parameters(flow, num - 1, num))
    counts = (
        list(pp_split)
        if pp_split is not None
        else balance(weights, pp, first=head, last=tail, forbidden=_unsplit(module, stack, plan) | uncuttable(flow))
    )
    if len(counts) != pp or sum(counts) != len(stack.layers) or min(counts) < 1:
        raise PlanError(
            f"pp split {','.join(map(str, counts))} does not deal {len(stack.layers)} layers to {pp} stages of at "
            "least one"
        )
    stages, stage_of, needs, first = [], {}, [], 0
    for index, count in enumerate(counts):
        layers = stack.layers[first : first + count]
        stage_of.update(dict.fromkeys(layers, index))
        edge_before, edge_after = before if index == 0 else (), after if index == pp - 1 else ()
        stages.append(Stage(index=index, modules=(*edge_before, *layers, *edge_after), layers=layers))
        needs.append(needed_parameters(flow, first, first + count))
        first += count
    stage_of |= dict.fromkeys(before, 0) | dict.fromkeys(after, pp - 1)
    placed = []
    for row in rows:
        found = [_home(name, stage_of) for name in (row.name, *row.aliases)]
        homes = {home for home in found if home is not None}
        if None in found:
            homes |= {stage for stage, names in enumerate(needs) if row.name in names}
        placed.append(replace(row, stages=tuple(sorted(homes)) or (0,)))
    return tuple(stages), placed


def balance(
    weights: Sequence[int], stages: int, *, first: int = 0, last: int = 0, forbidden: frozenset[int] = frozenset()
) -> list[int]:
    """Layers per stage so that the heaviest stage is as light as can be.

    Args:
        weights: of the layers.
        stages: how many.
        first, last: weight that the first and the last stage have besides.
        forbidden: numbers of layers that must stay with the one before them.

    Raises: PlanError if there are too few layers.
    """
    num = len(weights)
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    cuts = [i for i in range(num + 1) if i not in forbidden]
    # best[s][i]: the lightest heaviest stage, with layers before i on the first s stages, and where the last begins
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for stage in range(1, stages + 1):
        extra = (first if stage == 1 else 0) + (last if stage == stages else 0)
        row: dict[int, tuple[int, int]] = {}
        for end in cuts:
            options = [
                (max(before[0], sums[end] - sums[start] + extra), start)
                for start, before in best[-1].items()
                if start < end
            ]
            if options:
                row[end] = min(options)
        best.append(row)
    if num not in best[-1]:
        raise PlanError(f"{num} layers cannot be dealt to {stages} pipeline stages: use at most {num}")
    counts, end = [], num
    for stage in range(stages, 0, -1):
        start = best[stage][end][1]
        counts.append(end - start)
        end = start
    return counts[::-1]


def _around(module: nn.Module, plan: ParallelPlan, stack: LayerStack) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Entries of the plan before and after the layers; in the order of the model's code if it does not name these."""
    names = list(plan.pp)
    for i, name in enumerate(names):
        if stack.layers[0].startswith(name) or name == stack.container:
            return tuple(names[:i]), tuple(names[i + 1 :])
    order = {name: i for i, (name, _) in enumerate(module.named_modules())}
    first = order[stack.layers[0]]
    return tuple(n for n in names if order.get(n, first) < first), tuple(
        n for n in names if order.get(n, first) > first
    )


def _unsplit(module: nn.Module, stack: LayerStack, plan: ParallelPlan) -> frozenset[int]:
    """Numbers of layers that share an instance of a no-split class with the layer before them."""

    def guardians(layer: str) -> set[str]:
        levels = layer.split(".")
        above = {".".join(levels[:depth]) for depth in range(1, len(levels))}
        return {name for name in above if type(module.get_submodule(name)).__name__ in plan.no_split}

    held = [guardians(layer) for layer in stack.layers]
    return frozenset(i for i in range(1, len(held)) if held[i] & held[i - 1])


def _bytes_of_layers(rows: Sequence[ParameterRow], layers: Sequence[str]) -> list[int]:
    numbers, found = {name: number for number, name in enumerate(layers)}, [0] * len(layers)
    for row in rows:
        for number in {_home(name, numbers) for name in (row.name, *row.aliases)}:
            if number is not None:
                found[number] += row.local_bytes(0)
    return found


def _bytes_outside(rows: Sequence[ParameterRow], stack: LayerStack, names: Collection[str]) -> int:
    """Bytes of parameters that are in no layer."""
    within = tuple(f"{layer}." for layer in stack.layers)
    return sum(row.local_bytes(0) for row in rows if row.name in names and not row.name.startswith(within))


def _home(name: str, stage_of: Mapping[str, int]) -> int | None:
    """The stage, or the number, of the module that a parameter is in, the nearest one that has any."""
    levels = name.split(".")
    for depth in range(len(levels) - 1, 0, -1):
        if (stage := stage_of.get(".".join(levels[:depth]))) is not None:
            return stage
    return None

"""A model's tree as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TextIO

from torch import nn

from shardwright.plans.choose import Given, choose_plan
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.quantities import count, size
from shardwright.plans.structure import Node, Weight, structure_tree

ARROW = "  <- "
NOT_PLANNED = "in no entry of the plan"


def print_model_structure(
    model: nn.Module,
    max_depth: int | None = 4,
    show_params: bool = True,
    *,
    tp_plan: Given | None = None,
    pp_plan: Given | None = None,
    file: TextIO | None = None,
) -> None:
    """Print a model's modules, layers built and planned alike once, and which entry of its plan covers what.

    Args:
        model: on "meta" or not.
        max_depth: levels below the model; None shows all.
        show_params: show name, shape and type of every parameter.
        tp_plan, pp_plan: files or mappings in place of the model's own plan.
        file: where to; default: stdout.

    Raises: PlanError if a plan cannot be read.
    """
    plan = choose_plan(model, tp_file=tp_plan, pp_file=pp_plan)
    tree = structure_tree(model, plan)
    for line in tree_lines(tree, depth=max_depth, params=show_params, note=note_of(plan)):
        print(line, file=file)


def tree_lines(
    tree: Node, *, depth: int | None, params: bool, note: Callable[[Node | Weight], str] = lambda _: ""
) -> Iterator[str]:
    """A tree, one line a node, and a parameter if they are wanted.

    Args:
        tree: of a model.
        depth: levels below its root; None: all.
        params: whether parameters get lines.
        note: what to say at the end of a node's or a parameter's line.
    """
    yield f"{label(tree)}{_noted(note(tree))}"
    yield from _below(tree, depth=depth, params=params, note=note, indent="")


def _below(
    node: Node, *, depth: int | None, params: bool, note: Callable[[Node | Weight], str], indent: str
) -> Iterator[str]:
    if params:
        bar = "│" if node.children and depth != 0 else " "
        for weight in node.weights:
            yield f"{indent}{bar}    {weight.name} {list(weight.shape)} {weight.dtype}{_noted(note(weight))}"
    for child in node.children if depth != 0 else ():
        is_last = child is node.children[-1]
        yield f"{indent}{'└─' if is_last else '├─'} {label(child)}{_noted(note(child))}"
        below = None if depth is None else depth - 1
        yield from _below(child, depth=below, params=params, note=note, indent=indent + ("   " if is_last else "│  "))


def label(node: Node) -> str:
    """Name, class and size of a node."""
    name = f"{node.name} ({node.count} alike): " if node.count > 1 else f"{node.name}: " if node.name else ""
    what = f"{node.class_name}({node.detail})" if node.detail else node.class_name
    each = " each" if node.count > 1 else ""
    amount = f"  {count(node.num_parameters)}, {size(node.num_bytes)}{each}" if node.num_parameters else ""
    return f"{name}{what}{amount}"


def note_of(plan: ParallelPlan) -> Callable[[Node | Weight], str]:
    """What a plan says of a node or a parameter; matrices that it says nothing of are pointed out."""

    def is_forgotten(weight: Weight) -> bool:
        return bool(plan.tp) and weight.pattern is None and len(weight.shape) > 1

    def note(item: Node | Weight) -> str:
        if isinstance(item, Weight):
            return item.word or (NOT_PLANNED if is_forgotten(item) else "")
        said = [item.word] if item.word is not None else []
        said += [NOT_PLANNED] if any(is_forgotten(weight) for weight in item.weights) else []
        return ", ".join([*said, "pipeline"] if item.in_pipeline else said)

    return note


def _noted(text: str) -> str:
    return f"{ARROW}{text}" if text else ""

"""A module as a tree that fits a screen: layers that are built and planned alike become one node.

Works on any `nn.Module`, on "meta" as well as with weights. Not covered: what a module does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shardwright.plans.patterns import matches, specificity
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import matching_pattern

LONGEST_DETAIL = 60


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter that a module holds itself."""

    name: str
    """Within the module."""
    shape: tuple[int, ...]
    dtype: str
    pattern: str | None = None
    """The plan's entry that covers it."""
    word: str | None = None
    """What that entry says."""

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        document: dict[str, Any] = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}
        return document | ({"pattern": self.pattern, "style": self.word} if self.pattern is not None else {})


@dataclass(kw_only=True, slots=True)
class Node:
    """One module, or several siblings that differ in nothing but their number."""

    name: str
    """Within its parent; numbers of folded siblings as ranges, e.g. `0-3, 5`."""
    count: int = 1
    """Siblings folded into the node."""
    members: list[str]
    """Qualified name of every module that the node stands for, those below other folded nodes included."""
    class_name: str
    detail: str
    """Sizes and settings of a module without children, as its class prints them."""
    num_parameters: int
    """Of each member, with all below it; tied ones once."""
    num_bytes: int
    weights: list[Weight]
    pattern: str | None = None
    """The plan's entry that names the module."""
    word: str | None = None
    """What that entry says."""
    in_pipeline: bool = False
    """The plan's pipeline names the module."""
    children: list[Node] = field(default_factory=list)

    def as_json(self, *, depth: int | None, params: bool) -> dict[str, Any]:
        """The node as plain data, with as many levels below it as `depth` says."""
        document: dict[str, Any] = {
            "name": self.name,
            "class": self.class_name,
            "count": self.count,
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
        }
        if self.detail:
            document["detail"] = self.detail
        if self.pattern is not None:
            document |= {"pattern": self.pattern, "style": self.word}
        if self.in_pipeline:
            document["in_pipeline"] = True
        if params and self.weights:
            document["weights"] = [weight.as_json() for weight in self.weights]
        if self.children and depth != 0:
            below = None if depth is None else depth - 1
            document["children"] = [child.as_json(depth=below, params=params) for child in self.children]
        return document


def structure_tree(module: nn.Module, plan: ParallelPlan | None = None) -> Node:
    """The tree of a module, numbered siblings of equal structure folded.

    Args:
        module: its root.
        plan: what covers what; None leaves that out.
    """
    return _tree(module, plan or ParallelPlan(), name="", path="")


def _tree(module: nn.Module, plan: ParallelPlan, *, name: str, path: str) -> Node:
    prefix = f"{path}." if path else ""
    children = [
        _tree(child, plan, name=child_name, path=f"{prefix}{child_name}")
        for child_name, child in module.named_children()
    ]
    weights = []
    for own, parameter in module.named_parameters(recurse=False):
        pattern = matching_pattern(plan, f"{prefix}{own}")
        word = None if pattern is None else plan.tp[pattern]
        weights.append(Weight(own, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), pattern, word))
    parameters = list(module.parameters())
    named_by = max((p for p in plan.tp if matches(p, path)), key=specificity, default=None)
    return Node(
        name=name,
        members=[path],
        class_name=type(module).__name__,
        detail="" if children else shorten(module.extra_repr()),
        num_parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
        weights=weights,
        pattern=named_by,
        word=None if named_by is None else plan.tp[named_by],
        in_pipeline=path in plan.pp,
        children=fold(children),
    )


def fold(siblings: Iterable[Node]) -> list[Node]:
    """Join siblings that are equal but for the number in their name, wherever they stand among the others."""
    joined: dict[Any, list[Node]] = {}
    for node in siblings:
        stem = re.sub(r"\d+", "#", node.name)
        key = (stem, signature(node)) if "#" in stem else (node.name,)
        joined.setdefault(key, []).append(node)
    for alike in joined.values():
        first = alike[0]
        first.name = joined_name([node.name for node in alike])
        first.count = len(alike)
        for other in alike[1:]:
            absorb(first, other)
    return [alike[0] for alike in joined.values()]


def absorb(node: Node, other: Node) -> None:
    """Let a node stand for another one, and what is below it for what is below that."""
    node.members += other.members
    for child, others in zip(node.children, other.children, strict=True):
        absorb(child, others)


def signature(node: Node) -> tuple[Any, ...]:
    """What two nodes have in common when they are built alike."""
    below = tuple((child.name, signature(child)) for child in node.children)
    return (node.class_name, node.detail, tuple(node.weights), node.pattern, node.in_pipeline, below)


def joined_name(names: Sequence[str]) -> str:
    """`0-2, 5` for the names 0, 1, 2 and 5; `block_0-2` for block_0 to block_2."""
    if len(names) == 1:
        return names[0]
    stem, _, rest = re.split(r"(\d+)", names[0], maxsplit=1)
    numbers = [int(re.findall(r"\d+", name)[0]) for name in names]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    ranges = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"{stem}{ranges}{rest}"


def shorten(text: str) -> str:
    """One line of bearable length."""
    line = re.sub(r"(in|out)_features=", "", " ".join(text.split()))
    return line if len(line) <= LONGEST_DETAIL else line[: LONGEST_DETAIL - 1] + "…"

"""A module as a tree that fits a screen: layers that are built alike become one node.

Works on any `nn.Module`, on "meta" as well as with weights. Not covered: what a module does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

LONGEST_DETAIL = 60


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
    weights: list[tuple[str, tuple[int, ...], str]]
    """Name, shape and dtype of the parameters that the module holds itself."""
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
        if params and self.weights:
            document["weights"] = [{"name": n, "shape": list(s), "dtype": d} for n, s, d in self.weights]
        if self.children and depth != 0:
            below = None if depth is None else depth - 1
            document["children"] = [child.as_json(depth=below, params=params) for child in self.children]
        return document


def structure_tree(module: nn.Module, *, name: str = "", path: str = "") -> Node:
    """The tree of a module, numbered siblings of equal structure folded."""
    children = [
        structure_tree(child, name=child_name, path=f"{path}.{child_name}" if path else child_name)
        for child_name, child in module.named_children()
    ]
    own = list(module.named_parameters(recurse=False))
    parameters = list(module.parameters())
    return Node(
        name=name,
        members=[path],
        class_name=type(module).__name__,
        detail="" if children else shorten(module.extra_repr()),
        num_parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
        weights=[(n, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in own],
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
    return (node.class_name, node.detail, tuple(node.weights), below)


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

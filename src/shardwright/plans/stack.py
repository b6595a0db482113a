"""The layers of a model: the block that repeats, wherever it lives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from shardwright.errors import PlanError


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Layers in the order in which their container has them."""

    container: str
    """Qualified name of the module that holds them."""
    layers: tuple[str, ...]
    """Qualified names."""


def stack_in(module: nn.Module, container: str) -> LayerStack | None:
    """The layers that a container holds: children of a ModuleList, ModuleDict or Sequential, or numbered attributes.

    Args:
        module: the model.
        container: qualified name of a module in it; for numbered attributes also their common name, such as
            `decoder.layer` of `decoder.layer_0`, `decoder.layer_1`.

    Returns: None if the module holds none.
    Raises: PlanError if there is no such module.
    """
    owner, _, stem = container.rpartition(".")
    try:
        held = module.get_submodule(container)
    except AttributeError:
        try:
            parent = module.get_submodule(owner)
        except AttributeError:
            parent = nn.Module()
        names = [name for name, _ in _numbered(parent) if re.sub(r"[_.]*\d+$", "", name) == stem]
        if not names:
            raise PlanError(f"there is no module {container!r} in the model") from None
        return LayerStack(owner, tuple(f"{owner}.{name}" if owner else name for name in names))
    if isinstance(held, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        names = [name for name, _ in held.named_children()]
    else:
        names = [name for name, _ in _numbered(held)]
    prefix = f"{container}." if container else ""
    return LayerStack(container, tuple(f"{prefix}{name}" for name in names)) if names else None


def find_stack(module: nn.Module) -> LayerStack | None:
    """The stack of layers that holds most of the model's parameters, two layers at least; None if nothing repeats."""
    best: tuple[int, LayerStack] | None = None
    for name, _ in module.named_modules():
        stack = stack_in(module, name)
        if stack is None or len(stack.layers) < 2:
            continue
        kinds = {isinstance(module.get_submodule(layer), nn.ModuleList | nn.ModuleDict) for layer in stack.layers}
        if len(kinds) > 1:  # a ModuleDict of embedding, layers and norm is no stack of layers
            continue
        counts = [sum(p.numel() for p in module.get_submodule(layer).parameters()) for layer in stack.layers]
        if min(counts) > 0 and (best is None or sum(counts) > best[0]):
            best = sum(counts), stack
    return best[1] if best else None


def _numbered(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children whose names end in a number, by that number, of the name that most of them share."""
    families: dict[str, list[tuple[int, str, nn.Module]]] = {}
    for name, child in module.named_children():
        if match := re.fullmatch(r"(.*?)[_.]?(\d+)", name):
            families.setdefault(match[1], []).append((int(match[2]), name, child))
    largest = max(families.values(), key=len, default=[])
    return [(name, child) for _, name, child in sorted(largest, key=lambda item: item[0])]

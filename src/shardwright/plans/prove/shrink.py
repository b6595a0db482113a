"""A smaller model of the same structure, for a proof on a laptop: fewer layers, smaller vocabulary, narrower widths.

What decides how a model is cut stays: the numbers of heads and of key and value heads, every kind of layer, whether
things divide by the number of ranks. Only models with a Transformers config can be made smaller; others are proved as
they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.errors import PlanError
from shardwright.plans.patterns import generalize
from shardwright.plans.prove.shrink_config import LAYER_COUNTS, Extent, shrink_config
from shardwright.plans.stack import find_stack

logger = logging.getLogger(__name__)

LARGE = 200_000_000
"""Parameters of a model that is proved as it is: 0.8 GB in float32."""

MOST_SHRUNK = 400_000_000
"""Parameters of a smaller model: one of 70B that keeps its 80 layers has 270 million."""

TOO_LARGE = 2_000_000_000
"""Parameters of a model that cannot be proved unless it can be made smaller: 8 GB in float32."""

EXTENTS = (
    Extent(layers=True, widths=True, experts=True),
    Extent(layers=True, widths=True, experts=False),
    Extent(layers=True, widths=False, experts=True),
    Extent(layers=True, widths=False, experts=False),
    Extent(layers=False, widths=True, experts=True),
    Extent(layers=False, widths=True, experts=False),
)
"""From the smallest model to the largest; the first that the model's code can build and run is taken."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The model that is proved in place of another, and what was done to make it."""

    module: nn.Module
    notes: tuple[str, ...] = ()


def shrink(module: nn.Module, *, tp: int, pp: int, names: Collection[str] = (), keep_layers: bool = False) -> Shrunk:
    """A smaller model of the same structure, if a model is large; else the model itself.

    Args:
        module: may be on "meta".
        tp: ranks; what divides by it, or does not, stays so.
        pp: stages; as many layers are left at least.
        names: patterns and names of the plan; layers that they number are left.
        keep_layers: all layers are left.

    Returns: a module with parameters of no particular values.
    Raises: PlanError if the model is too large to be proved and cannot be made smaller.
    """
    size = sum(parameter.numel() for parameter in module.parameters())
    if size <= LARGE:
        return Shrunk(module)
    if isinstance(module, PreTrainedModel):
        layers = None if keep_layers else _layers_to_keep(module, max(pp, 2), names)
        for extent in EXTENTS:
            config = copy.deepcopy(module.config)
            notes = shrink_config(config, extent, layers=layers, tp=tp)
            smaller = _built(module, config) if notes else None
            if smaller is not None:
                count = sum(parameter.numel() for parameter in smaller.parameters())
                summary = f"proved on a smaller model of the same structure, {count:,} of {size:,} parameters"
                return Shrunk(smaller, (summary, *notes))
    if size > TOO_LARGE:
        raise PlanError(
            f"the model has {size:,} parameters, too many for a proof in one process, and cannot be made smaller by "
            "its config: give it a factory or a config for a smaller one of the same structure"
        )
    return Shrunk(module, ("proved at full size: no smaller model of the same structure can be made of it",))


def _layers_to_keep(module: nn.Module, least: int, names: Collection[str]) -> int | None:
    """How many layers from the first on have one of every kind; None if the layers are not found or counted."""
    stack = find_stack(module)
    config = module.config.get_text_config()  # type: ignore[union-attr, operator]
    if stack is None or not any(getattr(config, name, None) == len(stack.layers) for name in LAYER_COUNTS):
        return None
    numbered = [int(level) for name in names for level in name.split(".") if level.isdecimal()]
    kinds = [_kind(module.get_submodule(layer)) for layer in stack.layers]
    last_new = max(kinds.index(kind) for kind in kinds)
    return min(len(kinds), max(least, last_new + 1, *(number + 1 for number in numbered), 1))


def _kind(layer: nn.Module) -> Any:
    """What tells a kind of layer from another: its modules, their flags, the shapes of its parameters."""
    modules = []
    for name, owner in layer.named_modules():
        flags = tuple(
            (key, value if isinstance(value, bool | str) else value is None)
            for key, value in sorted(vars(owner).items())
            if not key.startswith("_") and isinstance(value, bool | str | int | None)
        )
        modules.append((name, type(owner).__name__, flags))
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return tuple(modules), shapes


def _built(module: PreTrainedModel, config: PretrainedConfig) -> nn.Module | None:
    """A model of a smaller config, if it has the structure of the large one, and runs."""
    try:
        with torch.device("meta"):
            sketch = type(module)._from_config(copy.deepcopy(config), dtype=torch.float32)
        if _structure(sketch) != _structure(module) or sum(p.numel() for p in sketch.parameters()) > MOST_SHRUNK:
            return None
        smaller: nn.Module = type(module)._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            smaller(torch.arange(8)[None] + 3)
    except Exception as exc:  # whatever code does with sizes that its author did not have in mind
        logger.debug("no smaller model with %s: %s", config, exc)
        return None
    return smaller


def _structure(module: nn.Module) -> set[tuple[str, str]]:
    return {(generalize(name), type(owner).__name__) for name, owner in module.named_modules()}

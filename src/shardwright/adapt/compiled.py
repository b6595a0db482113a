"""One layer compiled by torch.compile, for all layers that are built alike.

A model's layers share their code, so what is compiled for the first serves the others, and a start waits for one layer
rather than for the model ("regional compilation"). Attention itself is left out: the kernels are ours, and their plans
change from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardwright.adapt import dispatch


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The longest list of children of one class, two or more of them."""
    lists = [
        list(part)
        for part in module.modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(child) for child in part}) == 1
    ]
    return max(lists, key=len, default=[])


def compile_layers(module: nn.Module) -> Callable[[], None]:
    """Let a model's layers be compiled when they first run.

    Args:
        module: whose attention calls go through Transformers' attention interface.

    Returns: what undoes it.
    """
    layers = repeated_layers(module)
    for layer in layers:
        layer.forward = _compiled(layer.forward)
    dispatch.keep_from_compiler()

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For any number of tokens; compiled though the rest of the model's code may not be (see eager.py)."""
    compiled = torch.compile(forward, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return compiled(*args, **kwargs)

    return run

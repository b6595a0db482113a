"""The logits in whatever a module's forward returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt.probe import accepts
from shardwright.errors import UnsupportedModelError


def logits_of(output: Any) -> Tensor:
    """[B, T, vocab] logits of whatever a module returns: a tensor, an output record, a tuple that begins with them.

    Raises: UnsupportedModelError if there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None and isinstance(output, (tuple, list)):
        logits = next((item for item in output if isinstance(item, Tensor) and item.ndim >= 2), None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"its forward returns {type(output).__name__}, in which there are no logits")
    if logits.ndim == 2:  # of one sequence
        logits = logits[None]
    if logits.ndim != 3:
        raise UnsupportedModelError(
            f"its forward returns logits of shape {tuple(logits.shape)}, not [1, tokens, vocab]"
        )
    return logits


def rows_of(logits: Tensor, rows: Tensor) -> Tensor:
    """The logits that are wanted, of a head that may have computed no others.

    Args:
        logits: [T, vocab] or [R, vocab]; [_, 0] of a pipeline stage that has no head.
        rows: [R] int64.

    Returns: [R, vocab].
    """
    if logits.shape[1] == 0:
        return logits.new_empty(len(rows), 0)
    return logits if len(logits) == len(rows) else logits[rows]


def without_cache(module: nn.Module) -> dict[str, Any]:
    """Arguments that keep a module's forward from making a cache, if it has one."""
    return {"use_cache": False} if accepts(module, "use_cache", or_any=True) else {}


def own_logits(module: nn.Module, input_ids: Tensor, places: Iterable[int] | None = None) -> Tensor:
    """What a module's own forward pass gives, called as any author's code can be.

    Args:
        module: to run.
        input_ids: [1, T] int64.
        places: tokens whose logits are wanted; default: all.

    Returns: [T, vocab], or [len(places), vocab]. Code that gives the last token's alone runs once for each.
    Raises: UnsupportedModelError if there is nothing of the kind in what it returns.
    """
    options, num_tokens = without_cache(module), input_ids.shape[1]
    logits = logits_of(module(input_ids, **options))[0]
    if len(logits) not in (1, num_tokens):
        raise UnsupportedModelError(f"its forward returns logits of {len(logits)} tokens for {num_tokens}")
    if len(logits) == num_tokens:
        return logits if places is None else logits[torch.tensor(list(places), device=logits.device)]
    return torch.cat(
        [
            logits if place == num_tokens - 1 else logits_of(module(input_ids[:, : place + 1], **options))[0]
            for place in (range(num_tokens) if places is None else places)
        ]
    )

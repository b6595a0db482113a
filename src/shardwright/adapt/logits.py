"""The logits in whatever a module's forward returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt.arguments import plain_arguments
from shardwright.errors import UnsupportedModelError


def logits_of(output: Any) -> Tensor:
    """[B, T, vocab] logits of whatever a module returns: a tensor, a record or a dict that has them under a name with
    "logits" in it, or nothing else that could be they, a tuple that begins with them.

    Raises: UnsupportedModelError if there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and not isinstance(output, (tuple, list)):
        logits = _named_logits(output if isinstance(output, dict) else getattr(output, "__dict__", {}))
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


def _named_logits(items: dict[str, Any]) -> Any:
    """Of named values, the one that says that it is logits, or the only one that can be."""
    fitting = {name: v for name, v in items.items() if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()}
    named = [value for name, value in fitting.items() if "logits" in str(name)]
    candidates = named or list(fitting.values())
    return items.get("logits", candidates[0] if len(candidates) == 1 or named else None)


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


def own_logits(module: nn.Module, input_ids: Tensor, places: Iterable[int] | None = None) -> Tensor:
    """What a module's own forward pass gives, called as any author's code can be.

    Args:
        module: to run.
        input_ids: [1, T] int64.
        places: tokens whose logits are wanted; default: all.

    Returns: [T, vocab], or [len(places), vocab]. Code that gives the last token's alone runs once for each.
    Raises: UnsupportedModelError if there is nothing of the kind in what it returns.
    """
    num_tokens = input_ids.shape[1]

    def run(tokens: Tensor) -> Tensor:
        return logits_of(module(tokens, **plain_arguments(module, tokens)))[0]

    logits = run(input_ids)
    if len(logits) not in (1, num_tokens):
        raise UnsupportedModelError(f"its forward returns logits of {len(logits)} tokens for {num_tokens}")
    if len(logits) == num_tokens:
        return logits if places is None else logits[torch.tensor(list(places), device=logits.device)]
    return torch.cat(
        [
            logits if place == num_tokens - 1 else run(input_ids[:, : place + 1])
            for place in (range(num_tokens) if places is None else places)
        ]
    )

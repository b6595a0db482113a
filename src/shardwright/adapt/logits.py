"""The logits in whatever a module's forward returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shardwright.errors import UnsupportedModelError


def logits_of(output: Any) -> Tensor:
    """[B, T, vocab] logits of whatever a module returns: a tensor, an output record, a tuple that begins with them."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = next((item for item in output if isinstance(item, Tensor) and item.ndim == 3), None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"its forward returns {type(output).__name__}, in which there are no logits")
    return logits

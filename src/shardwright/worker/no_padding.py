"""Batches here have no padding, so code need not look for it."""

from __future__ import annotations

from torch import nn

_PADDING_WARNING = "warn_if_padding_and_no_attention_mask"


def expect_no_padding(module: nn.Module) -> None:
    """Keep Transformers from looking for padding in every step, and from warning of it: there is none."""
    for held in module.modules():
        if hasattr(held, _PADDING_WARNING):
            setattr(held, _PADDING_WARNING, lambda *_: None)

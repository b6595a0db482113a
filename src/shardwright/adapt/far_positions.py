"""Rotary embeddings whose frequencies depend on the longest sequence of a forward pass.

Transformers' rope types "dynamic" and "longrope" turn all tokens differently once one of them stands past the original
length. One request at a time that is what `generate` does; in a packed batch one long request would turn everybody's.
Code with a scheme of its own is not noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shardwright.adapt.arguments import without_cache
from shardwright.adapt.logits import logits_of

NUM_TOKENS = 9
CHANGE = 1e-3
"""Share of the logits' spread; the same operations on the same numbers give less, also in half precision."""


@torch.inference_mode()
def far_position_turns_others(module: nn.Module, *, num_positions: int) -> bool:
    """Whether the logits of a few tokens change when the one after them stands at the last position.

    Args:
        module: in eval mode, weights loaded, with its own attention.
        num_positions: longest sequence that will be served.
    """
    if not any(kind == "longrope" or "dynamic" in kind for kind in _rope_types(module)) or num_positions <= NUM_TOKENS:
        return False
    device = next(module.parameters()).device
    tokens = torch.arange(NUM_TOKENS, device=device)[None]
    far = tokens.clone()
    far[0, -1] = num_positions - 1
    # The far one first: dynamic frequencies are set back by a short sequence.
    turned, plain = (
        logits_of(module(input_ids=tokens, position_ids=positions, **without_cache(module)))[0, :-1].float()
        for positions in (far, tokens)
    )
    if plain.numel() == 0:  # of a pipeline stage that has no head
        return False
    return bool((turned - plain).square().mean().sqrt() > CHANGE * plain.std())


def _rope_types(module: nn.Module) -> Iterator[str]:
    """The kinds of rotary embeddings inside; some keep one for each type of layer."""
    for part in module.modules():
        rope_type = getattr(part, "rope_type", None)
        yield from (str(kind) for kind in (rope_type.values() if isinstance(rope_type, dict) else [rope_type]))

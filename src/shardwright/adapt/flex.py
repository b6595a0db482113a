"""Calls of torch's flex_attention, spelled out.

What `score_mod` and `mask_mod` do is said in Python, score by score. Both are given all scores at once here, with
indices that broadcast against them, which gives the same for whatever may be written in them.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLEX = torch.ops.higher_order.flex_attention
"""What flex_attention hands its arguments on to, compiled or not."""


def attend_openly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What FLEX gives, by a product, a softmax and a product.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D].
        value: [B, K, S, V].
        score_mod: of a score and its batch, head, query and key.
        block_mask: ends with a function of batch, head, query and key.
        scale: of the products.
        kernel_options: which of the further results are wanted.

    Returns: [B, H, T, V], and [B, H, T] each: the logarithm of the sums, the largest scores, both to base 2.
    """
    key, value = (repeated(heads, query.shape[1]) for heads in (key, value))
    # Indices, and no counts of tokens, which a call of torch.arange would be.
    indices = [
        torch.from_numpy(np.arange(size)).to(query.device).view([-1 if i == dim else 1 for i in range(4)])
        for dim, size in enumerate((*query.shape[:3], key.shape[2]))
    ]
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    scores = score_mod(scores, *indices)
    scores = torch.where(block_mask[-1](*indices), scores, -float("inf"))
    weights = torch.softmax(scores.float(), -1).to(value.dtype)
    return torch.matmul(weights, value), scores.logsumexp(-1) / log(2), scores.amax(-1) / log(2)


def repeated(heads: Tensor, num_heads: int) -> Tensor:
    """Keys or values [B, K, S, D], once for each of the query heads that share them: [B, num_heads, S, D]."""
    return heads.repeat_interleave(num_heads // heads.shape[1], dim=1)


def wants_more(kernel_options: dict[str, Any]) -> bool:
    """Whether a call asks for more than the output."""
    return bool(kernel_options.get("OUTPUT_LOGSUMEXP") or kernel_options.get("OUTPUT_MAX"))

"""Choosing tokens on a GPU: greedily or with noise, from all tokens or those that filters keep, for all rows at once.

What it computes is what worker/sampler.py computes with torch's operators, which is its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwright.kernels.triton.programs import sample as programs
from shardwright.kernels.triton.types import power_of_two

NUMBERS = 2048
"""Of a row that a program holds at a time."""
PER_SPLIT = 4 * NUMBERS
"""That it takes in all, unless that makes too many."""
MOST_SPLITS = 64

CANDIDATES = 512
"""The likeliest tokens that filters look at."""
TILE = 16
"""Of these, compared with all of them at a time."""

IS_NAN, IS_OPEN = 1, 2
"""What is said of a token: some logit of its row is no number; its filter may reach beyond the candidates."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    *,
    is_filtered: bool,
) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: [n, vocab], any floating type, numbers of a row contiguous.
        temperature: [n], float32; 0 is greedy, and looks at no filter.
        top_k: [n], int32; the size of the vocabulary or more: all.
        top_p, min_p: [n], float32; 1 and 0: all.
        keys: [n, 2], int32: of the rows' noise.
        is_filtered: whether some row has a filter.

    Returns: [n, 2] int32: tokens, and what is said of them, IS_NAN and IS_OPEN added up; tokens of which something is
        said are of no meaning.
    """
    num_rows, vocab = logits.shape
    per_split = PER_SPLIT
    while -(-vocab // per_split) > MOST_SPLITS:
        per_split *= 2
    num_splits = -(-vocab // per_split)
    splits = power_of_two(num_splits)
    numbers = logits.new_empty(num_rows, splits, 3, dtype=torch.float32)
    found = logits.new_empty(num_rows, splits, 2, dtype=torch.int32)
    output = logits.new_empty(num_rows, 2, dtype=torch.int32)
    if not num_rows:
        return output
    width = min(NUMBERS, power_of_two(vocab))
    programs.scan[num_rows, splits](
        logits,
        temperature,
        keys,
        numbers,
        found,
        vocab,
        logits.stride(0),
        PER_SPLIT=per_split,
        WIDTH=width,
        num_warps=4,
    )
    values, ids = numbers, found
    num_candidates = min(CANDIDATES, vocab)
    if is_filtered:
        values, ids = logits.topk(num_candidates, dim=-1, sorted=False)
    programs.choose[(num_rows,)](
        numbers,
        found,
        values,
        ids,
        temperature,
        top_k,
        top_p,
        min_p,
        keys,
        output,
        vocab,
        num_candidates,
        NUM_SPLITS=splits,
        IS_FILTERED=is_filtered,
        CANDIDATES=power_of_two(num_candidates),
        TILE=min(TILE, power_of_two(num_candidates)),
        num_warps=8,
    )
    return output

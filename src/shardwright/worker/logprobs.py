"""Log-probabilities of tokens and of the likeliest alternatives, under the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwright.engine.messages import TokenLogprobs
from shardwright.worker.candidates import likeliest

_CHUNK = 2**22  # logits made float32 at a time: 16 MiB


def token_logprobs(logits: Tensor, token_ids: Tensor, nums: Sequence[int]) -> list[TokenLogprobs]:
    """Log-softmax at each row for one token and for the likeliest ones.

    The chosen token comes first, then the `nums` likeliest in order of rank, so it is there twice if it is one of them.
    Of equal logits the lower id is the likelier; the rank of the chosen token counts only tokens that are strictly
    likelier.

    Args:
        logits: [n, vocab], any float dtype; before temperature, penalties and filters.
        token_ids: [n], int64: the chosen tokens, on the device of `logits`.
        nums: how many of the likeliest tokens to list, for each row.
    """
    result: list[TokenLogprobs] = []
    step = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        result += _chunk_logprobs(logits[rows].float(), token_ids[rows, None], nums[rows])
    return result


def prompt_logprobs(logits: Tensor, next_token_ids: Tensor, num: int) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt's tokens.

    Args:
        logits: [n, vocab], any float dtype: at the positions before the tokens.
        next_token_ids: [n], int64: the prompt's tokens from the second on, on the device of `logits`.
        num: how many of the likeliest tokens to list at each position.
    """
    return token_logprobs(logits, next_token_ids, [num] * len(logits))


def _chunk_logprobs(logits: Tensor, token_ids: Tensor, nums: Sequence[int]) -> list[TokenLogprobs]:
    values = logits.gather(-1, token_ids)
    ranks = ((logits > values).sum(dim=-1) + 1).tolist()
    if most := min(max(nums), logits.shape[-1]):
        top_values, top_ids = likeliest(logits, most)
        values, token_ids = torch.cat([values, top_values], dim=-1), torch.cat([token_ids, top_ids], dim=-1)
    values = values - logits.logsumexp(dim=-1, keepdim=True)
    listed = zip(token_ids.tolist(), values.tolist(), ranks, nums, strict=True)
    return [TokenLogprobs(ids[: num + 1], numbers[: num + 1], rank) for ids, numbers, rank, num in listed]

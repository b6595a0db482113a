"""Drawing one token per row from filtered logits: top-k, then top-p, then min-p.

Tokens are ranked by logit, equal ones by id, so what a filter keeps is defined to the token and does not depend on the
batch: `top_k=1` is greedy. A sort of the vocabulary is avoided where it can be: filters look at the likeliest few, and
look further only for rows whose filter reaches past those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.worker.sampling_noise import gumbel

_FIRST_WIDTH = 128
_WIDEN_BY = 8
_CPU_CHUNK = 2**18  # numbers of noise made at a time: on a CPU they should stay in its cache
_DEVICE_CHUNK = 2**26


@dataclass(frozen=True, slots=True)
class Filters:
    """What each row keeps; arrays of one length."""

    top_k: npt.NDArray[np.int64]
    """The size of the vocabulary or more: all."""
    top_p: npt.NDArray[np.float32]
    """1: all."""
    min_p: npt.NDArray[np.float32]
    """0: all."""

    def are_narrow(self, vocab: int) -> npt.NDArray[np.bool_]:
        """Which rows do not keep all of so many tokens."""
        narrow: npt.NDArray[np.bool_] = (self.top_k < vocab) | (self.top_p < 1) | (self.min_p > 0)
        return narrow

    def take(self, index: npt.NDArray[np.int64]) -> Filters:
        return Filters(self.top_k[index], self.top_p[index], self.min_p[index])


def likeliest(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest scores of each row, falling, and their ids; of equal scores the lowest ids, in rising order.

    Args:
        scores: [n, vocab], any float dtype.
        num: at most vocab.

    Returns: scores and ids (int64), [n, num] each.
    """
    vocab = scores.shape[-1]
    width = num + max(16, num // 4)
    while width < vocab:
        # `topk` takes any of the scores that tie at its border. They are all in hand if the border lies below the last
        # one wanted.
        values, ids = scores.topk(width, dim=-1)
        if bool((values[:, num - 1] > values[:, -1]).all()):
            ids, order = ids.sort(dim=-1)
            values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
            return values[:, :num], ids.gather(-1, order)[:, :num]
        width *= 4
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :num], ids[:, :num]


def draw(scores: Tensor, filters: Filters, keys: Tensor) -> Tensor:
    """Draw a token for each row.

    Args:
        scores: [n, vocab], float32: logits over temperature.
        filters: of the n rows.
        keys: [n, 2], int32: of the rows' noise.

    Returns: [n], int64, on the device of `scores`.
    """
    vocab = scores.shape[-1]
    chosen = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    is_filtered = filters.are_narrow(vocab)
    free = _index(np.flatnonzero(~is_filtered), scores)
    if len(free):
        chosen[free] = _draw_from_all(scores[free], keys[free])
    pending = np.flatnonzero(is_filtered)
    width = _first_width(filters.take(pending), vocab) if len(pending) else 0
    while len(pending):
        rows = _index(pending, scores)
        picked, complete = _draw_from_likeliest(scores[rows], filters.take(pending), keys[rows], width)
        chosen[rows[complete]] = picked[complete]
        pending = pending[~complete.cpu().numpy()]
        width = width * _WIDEN_BY if width * _WIDEN_BY < vocab // 4 else vocab
    return chosen


def _draw_from_all(scores: Tensor, keys: Tensor) -> Tensor:
    vocab = scores.shape[-1]
    token_ids = torch.arange(vocab, dtype=torch.int32, device=scores.device)[None]
    step = max(1, (_CPU_CHUNK if scores.device.type == "cpu" else _DEVICE_CHUNK) // vocab)
    parts = zip(torch.split(scores, step), torch.split(keys, step), strict=True)
    return torch.cat([gumbel(part_keys, token_ids).add_(part).argmax(dim=-1) for part, part_keys in parts])


def _draw_from_likeliest(scores: Tensor, filters: Filters, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Draw from the `width` likeliest tokens: the choices, and whether each row's filter ends within them (bool)."""
    vocab = scores.shape[-1]
    top_k = _index(filters.top_k, scores)[:, None]
    values, ids = likeliest(scores, width)
    keep = torch.arange(width, device=scores.device) < top_k
    if (filters.top_p < 1).any():
        # Without a limit all tokens share in the total, with one only those within it.
        log_total = values.masked_fill(~keep, -torch.inf).logsumexp(dim=-1, keepdim=True)
        if ((filters.top_p < 1) & (filters.top_k >= vocab)).any():
            log_total = torch.where(top_k < vocab, log_total, scores.logsumexp(dim=-1, keepdim=True))
        probabilities = (values - log_total).exp()
        needed = np.where(filters.top_p < 1, filters.top_p, np.float32(np.inf))  # sums round to over 1
        keep &= probabilities.cumsum(dim=-1) - probabilities < torch.from_numpy(needed).to(scores.device)[:, None]
    if (filters.min_p > 0).any():
        margin = torch.from_numpy(filters.min_p).to(scores.device).log()[:, None]
        keep &= values >= values[:, :1] + margin
    keep[:, 0] = True
    noisy = gumbel(keys, ids.int()).add_(values).masked_fill_(~keep, -torch.inf)
    picked = ids.gather(-1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
    return picked, ~keep[:, -1] | (top_k[:, 0] <= width)


def _first_width(filters: Filters, vocab: int) -> int:
    limited = filters.top_k[filters.top_k < vocab]
    open_ended = len(limited) < len(filters.top_k)
    return min(max(int(limited.max(initial=0)), _FIRST_WIDTH if open_ended else 1), vocab)


def _index(values: npt.NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)

"""The noise of sampling: a pure function of a key and a token id.

Noise belongs to a token of a sequence at a position, not to a generator's state: a sequence with a seed draws the same
noise whatever runs beside it, after preemption, and on any device, and a candidate that a filter left out costs no
draw. Small differences in logits (another batch shape, another kernel) change the choice only where two tokens were
about to tie.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt64s = npt.NDArray[np.uint64]

# 32-bit factors, as signed numbers.
_GOLDEN = 0x9E3779B9 - 2**32
_MURMUR_1 = 0x85EBCA6B - 2**32
_MURMUR_2 = 0xC2B2AE35 - 2**32
_MAX_INT31 = 0x7FFFFFFF
_TO_UNIT = 2.0**-31 * (1 - 2.0**-24)  # keeps the largest draw below 1 in float32, so that its noise is finite


def splitmix64(values: UInt64s) -> UInt64s:
    """Mix 64-bit integers so that neighbours have nothing in common.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def sequence_keys(seeds: npt.NDArray[np.int64], num_tokens: npt.NDArray[np.int64]) -> UInt64s:
    """Keys of sequences with a seed each, for the token that follows `num_tokens` tokens."""
    return splitmix64(splitmix64(seeds.view(np.uint64)) + num_tokens.view(np.uint64))


def split_keys(keys: UInt64s, device: torch.device) -> Tensor:
    """64-bit keys as pairs of 32-bit ones: [len(keys), 2], int32, on `device`."""
    return torch.from_numpy(keys.view(np.int32).reshape(len(keys), 2)).to(device)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Noise with the standard Gumbel distribution: the argmax of logits plus this is a sample of their softmax.

    The same as dividing probabilities by exponential noise, in logarithms. The hash is the finalizer of MurmurHash3
    with the second key let in halfway.

    Args:
        keys: [n, 2], int32.
        token_ids: [n, m] or [1, m], int32.

    Returns: [n, m], float32.
    """
    # Products wrap around; shifts of negative numbers bring in ones, which the masks take away.
    bits = token_ids * _GOLDEN + keys[:, :1]
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _MURMUR_1
    bits ^= (bits >> 13) & 0x7FFFF
    bits ^= keys[:, 1:]
    bits *= _MURMUR_2
    bits ^= (bits >> 16) & 0xFFFF
    uniform = (bits & _MAX_INT31).float().add_(0.5).mul_(_TO_UNIT)
    return uniform.neg_().log1p_().neg_().log_().neg_()

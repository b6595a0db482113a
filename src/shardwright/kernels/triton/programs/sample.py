"""One token for each row of logits: the vocabulary is read once, by several programs, and what they found put together.

The noise is that of worker/sampling_noise.py: a function of a key and a token id.
"""

import triton
import triton.language as tl

IS_NAN = tl.constexpr(1)
IS_OPEN = tl.constexpr(2)
NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def scan(
    logits,
    temperatures,
    keys,
    numbers,
    found,
    vocab,
    row_stride,
    PER_SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (row, split): its largest score with noise, whose that is, and the sum of its exponentials.

    `numbers` [n, splits, 3] are the largest score and the sum relative to it, then the one with noise; `found`
    [n, splits, 2] are the token's id and whether some logit is not a number.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    low, high = tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
    start = split * PER_SPLIT
    highest = tl.full([], float("-inf"), tl.float32)
    best = tl.full([], float("-inf"), tl.float32)
    best_id = start
    total = tl.full([], 0.0, tl.float32)
    is_nan = tl.full([], 0, tl.int32)
    for first in range(start, tl.minimum(start + PER_SPLIT, vocab), WIDTH):
        ids = first + tl.arange(0, WIDTH)
        scores = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        is_number = scores == scores
        is_nan = tl.maximum(is_nan, tl.max(tl.where(is_number, 0, 1), 0))
        scores = tl.where(is_number, scores, float("-inf"))
        if temperature > 0.0:
            scores = scores / temperature
        higher = tl.maximum(highest, tl.max(scores, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(scores - shift), 0)
        highest = higher
        if temperature > 0.0:
            scores += _gumbel(ids, low, high)
        largest = tl.max(scores, 0)
        if largest > best:
            best = largest
            best_id = tl.min(tl.where(scores == largest, ids, NO_ID), 0)
    place = row * tl.num_programs(1) + split
    tl.store(numbers + 3 * place, highest)
    tl.store(numbers + 3 * place + 1, total)
    tl.store(numbers + 3 * place + 2, best)
    tl.store(found + 2 * place, best_id)
    tl.store(found + 2 * place + 1, is_nan)


@triton.jit
def choose(
    numbers,
    found,
    values,
    ids,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    keys,
    output,
    vocab,
    num_candidates,
    NUM_SPLITS: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row): `output` [n, 2] is the token, and what is to be said of it.

    `values` and `ids` [n, num_candidates] are the largest logits of a row, in any order. Rows with filters draw from
    these. IS_OPEN: one of those that a filter kept is as large as the smallest of them, so there may be more; or top_k
    is more than there are of them.
    """
    row = tl.program_id(0).to(tl.int64)
    splits = row * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    best = tl.load(numbers + 3 * splits + 2)
    token = tl.min(tl.where(best == tl.max(best, 0), tl.load(found + 2 * splits), NO_ID), 0)
    said = tl.where(tl.max(tl.load(found + 2 * splits + 1), 0) > 0, IS_NAN, 0)
    if IS_FILTERED:
        temperature = tl.load(temperatures + row)
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        if (temperature > 0.0) & ((top_k < vocab) | (top_p < 1.0) | (min_p > 0.0)):
            place = tl.arange(0, CANDIDATES)
            exists = place < num_candidates
            start = row * num_candidates
            own = tl.load(values + start + place, mask=exists, other=float("-inf")).to(tl.float32) / temperature
            own_ids = tl.load(ids + start + place, mask=exists, other=NO_ID).to(tl.int32)
            highest = tl.max(own, 0)
            num_before = tl.full([CANDIDATES], 0, tl.int32)
            before = tl.full([CANDIDATES], 0.0, tl.float32)
            for first in range(0, num_candidates, TILE):
                other_place = first + tl.arange(0, TILE)
                is_other = other_place < num_candidates
                other = tl.load(values + start + other_place, mask=is_other, other=float("-inf")).to(tl.float32)
                other = other / temperature
                other_ids = tl.load(ids + start + other_place, mask=is_other, other=NO_ID).to(tl.int32)
                is_first = other_ids[None, :] < own_ids[:, None]
                is_before = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & is_first)
                num_before += tl.sum(is_before.to(tl.int32), 1)
                before += tl.sum(tl.where(is_before, tl.exp(other - highest)[None, :], 0.0), 1)
            within = exists & (num_before < top_k)
            if top_k < vocab:  # tokens share in what there is within the limit, else in all
                total = tl.sum(tl.where(within, tl.exp(own - highest), 0.0), 0)
            else:
                highs = tl.load(numbers + 3 * splits)
                shift = tl.where(highs == float("-inf"), 0.0, highs) - highest
                total = tl.sum(tl.load(numbers + 3 * splits + 1) * tl.exp(shift), 0)
            mass = tl.where(top_p < 1.0, top_p * total, float("inf"))
            least = tl.where(min_p > 0.0, highest + tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
            kept = within & (before < mass) & (own >= least) & (own > float("-inf"))
            kept = kept | (num_before == 0)
            noisy = own + _gumbel(own_ids, tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1))
            noisy = tl.where(kept & exists, noisy, float("-inf"))
            token = tl.min(tl.where((noisy == tl.max(noisy, 0)) & exists, own_ids, NO_ID), 0)
            smallest = tl.min(tl.where(exists, own, float("inf")), 0)
            if num_candidates < vocab:
                num_open = tl.sum((kept & exists & (own == smallest)).to(tl.int32), 0)
                is_limit_beyond = tl.where(top_k < vocab, top_k, 0) > num_candidates  # and with it what is shared in
                said += tl.where(tl.where(is_limit_beyond, 1, num_open) > 0, IS_OPEN, 0)
    tl.store(output + 2 * row, tl.minimum(token, vocab - 1))
    tl.store(output + 2 * row + 1, said)


@triton.jit
def _gumbel(ids, low, high):
    """As sampling_noise.gumbel. Products wrap around; masks take away what shifts of negative numbers bring in."""
    bits = ids * -1640531527 + low
    bits ^= (bits >> 16) & 0xFFFF
    bits *= -2048144789
    bits ^= (bits >> 13) & 0x7FFFF
    bits ^= high
    bits *= -1028477387
    bits ^= (bits >> 16) & 0xFFFF
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612595521636e-10  # 2**-31, a little less
    # -log(1 - u): where u is small, the logarithm of a GPU is too inexact, and its series is not.
    series = 1.0 / 5 + uniform * (1.0 / 6 + uniform * (1.0 / 7))
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3 + uniform * (0.25 + uniform * series))))
    exponential = tl.where(uniform < 0.0625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)

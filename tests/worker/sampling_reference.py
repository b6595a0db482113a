"""Plain sampling of one row, token by token, in Python numbers: the oracle of the sampler's tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardwright.sampling_params import SamplingParams

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def mix(value: int) -> int:
    """SplitMix64 of one integer."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def noise(key: int, token_id: int) -> float:
    """Gumbel noise of one token."""
    low, high = key & MASK32, key >> 32
    bits = (token_id * 0x9E3779B9 + low) & MASK32
    bits ^= bits >> 16
    bits = (bits * 0x85EBCA6B) & MASK32
    bits ^= bits >> 13
    bits ^= high
    bits = (bits * 0xC2B2AE35) & MASK32
    bits ^= bits >> 16
    uniform = ((bits & 0x7FFFFFFF) + 0.5) * 2.0**-31 * (1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def process(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_token_ids: Sequence[int],
) -> list[float]:
    """Logits after bias, penalties and suppressed stop tokens."""
    scores = list(logits)
    for token_id, bias in (params.logit_bias or {}).items():
        scores[token_id] += bias
    for token_id in {*prompt, *output}:
        repetition = params.repetition_penalty
        scores[token_id] = scores[token_id] / repetition if scores[token_id] > 0 else scores[token_id] * repetition
    for token_id in output:
        scores[token_id] -= params.frequency_penalty
    for token_id in set(output):
        scores[token_id] -= params.presence_penalty
    if len(output) < params.min_tokens:
        for token_id in stop_token_ids:
            scores[token_id] = -math.inf
    return scores


def ranking(scores: Sequence[float]) -> list[int]:
    """Token ids from the likeliest on, of equal ones the lowest first."""
    return sorted(range(len(scores)), key=lambda token_id: (-scores[token_id], token_id))


def softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def kept(scores: Sequence[float], params: SamplingParams) -> tuple[list[int], float]:
    """What top-k, top-p and min-p keep of logits over temperature, and how near the closest call was."""
    ranked = ranking(scores)
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    probabilities = softmax([scores[token_id] for token_id in ranked])
    keep, before, closest = [], 0.0, math.inf
    for token_id, probability in zip(ranked, probabilities, strict=True):
        if params.top_p < 1 and keep:
            closest = min(closest, abs(before - params.top_p))
            if before >= params.top_p:
                break
        if params.min_p > 0:
            if probability != probabilities[0]:
                closest = min(closest, abs(probability / probabilities[0] - params.min_p))
            if probability < params.min_p * probabilities[0]:
                break
        keep.append(token_id)
        before += probability
    return keep, closest


def choose(scores: Sequence[float], params: SamplingParams, *, num_tokens: int) -> tuple[int, float]:
    """The token for processed logits, and how near the closest call on the way was."""
    ranked = ranking(scores)
    if params.is_greedy:
        return ranked[0], math.inf
    scores = [score / params.temperature for score in scores]
    keep, closest = kept(scores, params)
    assert params.seed is not None
    key = mix((mix(params.seed & MASK64) + num_tokens) & MASK64)
    noisy = sorted(((scores[token_id] + noise(key, token_id), token_id) for token_id in keep), reverse=True)
    if len(noisy) > 1:
        closest = min(closest, noisy[0][0] - noisy[1][0])
    return noisy[0][1], closest

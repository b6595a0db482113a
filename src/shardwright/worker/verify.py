"""Which proposed tokens come true, and the token after them.

At every position the sampler chooses as it would have without a proposal; the sequence goes on to the next position for
as long as the choice is what was proposed there. So every token is a choice of the model's own distribution, given the
tokens before it, whatever was proposed: nothing has to be corrected afterwards.

For a proposal x that is simply given this is rejection sampling: x is accepted with its probability p(x), and what
comes in its place is distributed as p without x (Leviathan et al., "Fast inference from transformers via speculative
decoding", 2023; Chen et al., "Accelerating large language model decoding with speculative sampling", 2023). A draft
model draws its proposals with the very noise that the sampler will use at their positions (sampling_noise.py), so that
the two agree wherever their distributions do: with probability at least (1 - d) / (1 + d) at total variation d, where
rejection sampling reaches 1 - d (Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant
speculative decoding", 2024). In return tokens do not depend on proposals: a sequence with a seed has the same ones with
speculation as without, however often it was preempted and whatever ran beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.engine.messages import TokenLogprobs
from shardwright.worker.sampler import Sampler
from shardwright.worker.sampling_state import SamplingState
from shardwright.worker.step import Ints


@dataclass(frozen=True, slots=True)
class Proposed:
    """Tokens to verify, of n sequences."""

    token_ids: Ints
    """[n, most], the rest zero."""
    counts: Ints
    """[n]."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What n sequences got."""

    token_ids: Ints
    """[n]: the last token of each."""
    num_accepted: Ints
    """[n]: proposed tokens that come before it."""
    logprobs: list[list[TokenLogprobs]]
    """[n]: of all these, for the sequences that asked."""
    failed: list[int]
    """Sequences whose logits were not numbers behind these; their last token means nothing, and was not taken."""


def verify(
    logits: Tensor,
    proposed: Proposed,
    rows: Ints,
    *,
    sampler: Sampler,
    state: SamplingState,
    take: Callable[[Ints, Ints], None],
) -> Verified:
    """Choose tokens for sequences; those without proposals get one each.

    Args:
        logits: [n + all proposed, vocab]: after the last known token of a sequence and each proposed one, one sequence
            after another.
        proposed: of the sequences.
        rows: [n], distinct.
        sampler: chooses.
        state: of the sampler; up to date after each call of `take`.
        take: writes down one more token for some rows.
    """
    count, most = proposed.token_ids.shape
    first = np.cumsum(proposed.counts + 1) - proposed.counts - 1
    tokens, num_accepted = np.zeros(count, np.int64), np.zeros(count, np.int64)
    logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
    failed: list[int] = []
    going = np.arange(count)
    for ahead in range(most + 1):
        at = logits if len(logits) == count else logits[torch.from_numpy(first[going] + ahead).to(logits.device)]
        sampled = sampler(at, state, rows[going])
        tokens[going] = sampled.token_ids
        is_number = ~chosen_are_nan(at, sampled.token_ids)
        failed += going[~is_number].tolist()
        take(rows[going[is_number]], sampled.token_ids[is_number])
        for place, own in zip(going.tolist(), sampled.logprobs, strict=True):
            if own is not None:
                logprobs[place].append(own)
        if ahead == most:
            break
        is_right = (ahead < proposed.counts[going]) & (sampled.token_ids == proposed.token_ids[going, ahead])
        going = going[is_right & is_number]
        if not len(going):
            break
        num_accepted[going] += 1
    return Verified(tokens, num_accepted, logprobs, failed)


def chosen_are_nan(logits: Tensor, token_ids: Ints) -> np.ndarray:
    """[n] bool. Not-a-number wins every argmax, so it is enough to look at the chosen logits."""
    chosen = torch.from_numpy(token_ids).to(logits.device)[:, None]
    return logits.gather(1, chosen).isnan().flatten().cpu().numpy()

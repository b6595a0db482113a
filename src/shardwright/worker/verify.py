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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.engine.messages import TokenLogprobs
from shardwright.worker.sampler import Sampler
from shardwright.worker.sampling_state import Bools, SamplingState
from shardwright.worker.step import Ints


@dataclass(frozen=True, slots=True)
class Verified:
    """What n sequences got."""

    token_ids: Ints
    """[n]: the last token of each."""
    num_accepted: dict[int, int]
    """By place among the n, how many proposed tokens come before it; those that have none are left out."""
    logprobs: dict[int, list[TokenLogprobs]]
    """By place, of all these, for the sequences that asked."""
    failed: list[int]
    """Places of sequences whose logits then were not numbers; their last token means nothing, and was not taken."""


def verify(
    logits: Tensor,
    rows: Ints,
    proposals: Mapping[int, Sequence[int]],
    *,
    sampler: Sampler,
    state: SamplingState,
    take: Callable[[Ints, Ints], None],
) -> Verified:
    """Choose tokens for sequences; those without proposals get one each.

    Args:
        logits: [n + all proposed, vocab]: after the last known token of a sequence and each proposed one, one sequence
            after another.
        rows: [n], distinct.
        proposals: by place in `rows`, tokens to verify.
        sampler: chooses.
        state: of the sampler; up to date after each call of `take`.
        take: writes down one more token for some rows.
    """
    logprobs: dict[int, list[TokenLogprobs]] = {}
    failed: list[int] = []

    def choose(logits: Tensor, places: Ints) -> tuple[Ints, Bools]:
        """The next token of some sequences, and which of them are none."""
        sampled = sampler(logits, state, rows[places])
        is_nan = sampled.is_nan
        if is_nan.any():
            failed.extend(places[is_nan].tolist())
            take(rows[places[~is_nan]], sampled.token_ids[~is_nan])
        else:
            take(rows[places], sampled.token_ids)
        for i, own in sampled.logprobs.items():
            logprobs.setdefault(int(places[i]), []).append(own)
        return sampled.token_ids, is_nan

    going = np.arange(len(rows))
    if not proposals:
        return Verified(choose(logits, going)[0], {}, logprobs, failed)
    counts, proposed = _packed(proposals, len(rows))
    first = np.cumsum(counts + 1) - counts - 1
    tokens, num_accepted = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    while len(going):
        ahead = num_accepted[going]
        at = torch.from_numpy(first[going] + ahead).to(logits.device)
        tokens[going], is_nan = choose(logits[at], going)
        is_right = ~is_nan & (ahead < counts[going]) & (tokens[going] == proposed[going, ahead])
        going = going[is_right]
        num_accepted[going] += 1
    accepted = {place: int(num_accepted[place]) for place in np.flatnonzero(num_accepted).tolist()}
    return Verified(tokens, accepted, logprobs, failed)


def _packed(proposals: Mapping[int, Sequence[int]], count: int) -> tuple[Ints, Ints]:
    """How many tokens are proposed for each of so many sequences, [n], and which, [n, one more than the most]."""
    counts = np.zeros(count, np.int64)
    token_ids = np.zeros((count, max(map(len, proposals.values())) + 1), np.int64)
    for place, own in proposals.items():
        counts[place] = len(own)
        token_ids[place, : len(own)] = own
    return counts, token_ids

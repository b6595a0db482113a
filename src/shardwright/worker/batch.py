"""What the scheduler asks of a worker in one step, and what comes back. Plain records, free of torch.

Every running sequence owns a *row* of the worker's tables (token ids, block tables, sampling parameters). A batch
carries only what is new to the workers: sequences that start or resume, blocks added or dropped, and the tokens sampled
since the last batch. The rank that sampled these has written them down by itself; the others learn them here.
"""

from __future__ import annotations

import msgspec

from shardwright.engine.messages import TokenLogprobs
from shardwright.sampling_params import SamplingParams


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that starts, or resumes after preemption, in a row."""

    row: int
    token_ids: list[int]
    """Prompt and the output so far."""
    num_prompt_tokens: int
    sampling_params: SamplingParams
    stop_token_ids: list[int]
    """Suppressed until `min_tokens` tokens exist."""


class TableUpdate(msgspec.Struct, frozen=True, array_like=True):
    """Blocks to write into the block table of a row, from place `start` on."""

    row: int
    group: int
    start: int
    blocks: list[int]


class Batch(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step: `num_tokens[i]` tokens of row `rows[i]`, from position `num_computed[i]` on.

    A row samples a token if the step computes the last token it knows. Those with proposed tokens compute these after
    it, and sample after each of them for as long as what was sampled is what was proposed next.
    """

    rows: list[int]
    num_computed: list[int]
    num_tokens: list[int]
    new_rows: list[NewRow]
    table_updates: list[TableUpdate]
    freed_rows: list[int] = []
    """Rows whose sequences left since the last batch; some may be taken again by `new_rows`."""
    sampled_rows: list[int] = []
    """Rows that got tokens from results that came in since the last batch, and run on; each stands here once for every
    token. Ranks that did not sample write the tokens down before they take in `new_rows`."""
    sampled_token_ids: list[int] = []
    """Their tokens, in the order of `sampled_rows`."""
    spoiled_rows: list[int] = []
    """Rows whose logits were not numbers in results that came in since the last batch. The rank that sampled has made
    their blocks harmless; the others do before all else."""
    proposed: dict[int, list[int]] = {}
    """By place in `rows`, tokens that may follow those known; part of `num_tokens`."""
    num_to_propose: dict[int, int] = {}
    """By place in `rows`, how many tokens the draft model shall propose for the next step. There are blocks for these,
    beyond the last token that this step computes."""

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens)


class StepResult(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a step computed, by place in the batch's `rows`."""

    token_ids: list[int | None]
    """The sampled token, the last one where proposals were accepted; None where the prompt goes on."""
    logprobs: dict[int, list[TokenLogprobs]]
    """Of the tokens that a row got, in order, for the rows that asked for them."""
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    """Of the tokens after each computed prompt position, for the rows that asked for them."""
    errors: dict[int, str] = {}
    """Rows whose logits were not numbers, and why no token could be sampled. Proposed tokens may have spoiled what is
    before them: then the last token is None, and the row has to go on from the accepted ones without proposals."""
    num_accepted: dict[int, int] = {}
    """For the rows with proposals, how many of these were sampled, one after another, before `token_ids`."""
    proposals: dict[int, list[int]] = {}
    """What the draft model takes to follow next, for the rows for which that was asked."""

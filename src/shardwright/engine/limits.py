"""What one scheduler may hand out, as resolved at start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """Resolved limits of one engine."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_in_flight: int = 1
    """Batches that the executor works on at the same time: one per pipeline stage."""
    runs_ahead: bool = False
    """Whether a batch may compute tokens that batches in flight before it sample."""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    by_priority: bool = False

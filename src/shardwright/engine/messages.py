"""What crosses the border between the front end (LLM, server) and the engine core, in one process or two.

Plain msgspec records, never pickled. The front end owns text; the core owns tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from shardwright.outputs import FinishReason
from shardwright.sampling_params import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate: a completion of a user's request. Made by the front end, read by the core."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    """With `n` 1 and `max_tokens` set."""
    eos_token_ids: list[int] = []
    """Tokens that end the output as end-of-sequence; empty with `ignore_eos`."""
    arrival_time: float = 0.0
    """time.monotonic() of the front end."""
    priority: int = 0
    """Lower runs first under the priority policy."""
    output_token_ids: list[int] = []
    """The output so far, of a sequence that another core has begun."""
    num_prompt_logprobs_sent: int = 0
    """Prompt log-probabilities that the other core has sent."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the chosen token first, then the likeliest."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the chosen token, 1 for the likeliest."""


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought for one sequence."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token id, unless it was end-of-sequence."""
    logprobs: list[TokenLogprobs] | None = None
    """One per new token."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For the prompt tokens computed in this step, from the second token on."""
    num_cached_tokens: int = 0
    num_proposed_tokens: int = 0
    """Tokens guessed ahead that this step verified."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""


class PoolingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One text to read as a whole. Made by the front end, read by the pooling core."""

    request_id: str
    prompt_token_ids: list[int]
    token_type_ids: list[int] | None = None
    """Which of two texts each token belongs to, for models that ask; None: all to the first."""


class PoolingOutput(msgspec.Struct, frozen=True, array_like=True):
    """What a model made of one text."""

    request_id: str
    values: bytes
    """Embedding, or logits of a classifier: float32 in the machine's byte order."""


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the scheduler after a step; counters grow from the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that no sequence holds; some keep cached prefixes until they are needed."""
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    num_proposed_tokens: int = 0
    """Tokens guessed ahead and verified."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""
    num_steps: int = 0
    num_restarts: int = 0
    """How often ranks were lost and started anew."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks held by sequences, from 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0

    @classmethod
    def total(cls, parts: Iterable[SchedulerStats]) -> SchedulerStats:
        """The sums over several schedulers."""
        records = list(parts)
        return cls(**{name: sum(getattr(one, name) for one in records) for name in cls.__struct_fields__})


class EngineOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought."""

    outputs: list[EngineOutput]
    stats: SchedulerStats
    pooled: list[PoolingOutput] = []
    """Of texts that were read whole."""


class PoolingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a model that reads whole texts makes of them."""

    size: int
    """Numbers per text: the embedding's, or one per label."""
    pooling: str | None = None
    """Which tokens an embedding is made of; None for a classifier."""
    normalize: bool = False
    """Whether embeddings have length 1."""
    dimensions: list[int] | None = None
    """Sizes that embeddings may be cut to; empty: any up to `size`; None: they may not be cut."""
    labels: list[str] = []
    """Of a classifier, by their places in its logits."""
    is_multi_label: bool = False
    """Whether labels do not exclude each other."""
    scores_are_logits: bool = False
    """Whether the score of a pair of texts is the logit itself; its sigmoid otherwise."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the core found out at start: the resolved configuration."""

    model: str
    """As the user named it."""
    path: str
    """Its directory; empty for code that has none."""
    model_type: str
    architecture: str
    dtype: str
    device: str
    num_parameters: int
    weight_bytes: int
    """Of all ranks; what several hold counts for each."""
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    attention_rung: str
    attention_reason: str
    attention_backend: str = ""
    """What computes the attention that is ours; empty: there is none."""
    takes_chunks: bool = True
    """Whether prompts may be computed in pieces."""
    reuses_prefixes: bool = True
    """Whether prompts may begin after a cached prefix."""
    can_rewind: bool = True
    """Whether tokens may be computed that turn out not to follow."""
    rank_weight_bytes: list[int] = []
    """Of each rank."""
    eos_token_ids: list[int] = []
    """Tokens that end an output, beside those that the model's directory and its tokenizer name."""
    task: Literal["generate", "embed", "classify"] = "generate"
    pooling: PoolingInfo | None = None
    """Of models that do not generate."""


class Add(msgspec.Struct, frozen=True, tag="add", array_like=True):
    """Queue a sequence."""

    request: EngineRequest


class Pool(msgspec.Struct, frozen=True, tag="pool", array_like=True):
    """Queue texts to be read whole."""

    requests: list[PoolingRequest]


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """End sequences, wherever they are."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache", array_like=True):
    """Forget cached prefixes."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    """End the core process."""


Command = Add | Pool | Abort | ResetPrefixCache | Shutdown
"""What the front end sends to a core in another process."""


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The core has loaded its model."""

    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag="outputs", array_like=True):
    """A step is done."""

    outputs: EngineOutputs


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """The core cannot start, or cannot go on; its process ends."""

    kind: str
    """Name of the class in shardwright.errors to raise."""
    message: str


Event = Ready | Outputs | Failed
"""What a core in another process sends to the front end."""

"""What a caller gets back for a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens or the model's length was reached."""
    ABORT = "abort"
    """The caller gave up, or the engine stopped."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural-log probability under the model, before temperature and filters."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One of the `n` completions of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    """None while the completion goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence and length."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per generated token: the chosen token first, then the likeliest ones, by token id."""
    cumulative_logprob: float | None = None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times of one request, in seconds, and where its tokens came from."""

    ttft_s: float | None = None
    """From arrival to the first token of any completion."""
    latency_s: float | None = None
    """From arrival to the end of the last completion."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    num_proposed_tokens: int = 0
    """Tokens guessed ahead and verified, of all completions."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """All that is known of a request: final, or so far while it streams."""

    request_id: str
    prompt: str | None
    """None when the caller gave token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token; the first is None, since nothing predicts it."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(kw_only=True, slots=True)
class EmbeddingOutput:
    """A text as a vector."""

    prompt: str | None
    """None when the caller gave token ids."""
    prompt_token_ids: list[int]
    embedding: list[float]


@dataclass(kw_only=True, slots=True)
class ClassificationOutput:
    """What a classifier says of a text."""

    prompt: str | None
    prompt_token_ids: list[int]
    logits: list[float]
    """One per label."""
    probs: list[float]
    """Softmax of the logits; of a single label or of labels that do not exclude each other, the sigmoid of each."""
    label: str
    """The likeliest one."""


@dataclass(kw_only=True, slots=True)
class ScoreOutput:
    """One number for a text, or for a pair of texts."""

    prompt_token_ids: list[int]
    score: float

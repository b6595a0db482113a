"""A sequence as the scheduler sees it. The engine owns the truth: all tokens live here, workers hold copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from shardwright.cache.manager import BlockTables
from shardwright.cache.prefix import extend_keys
from shardwright.engine.messages import EngineRequest
from shardwright.engine.pace import Pace
from shardwright.engine.prompt_lookup import PromptLookup
from shardwright.outputs import FinishReason


class RequestState(Enum):
    """Where a request is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class Guesses:
    """What is guessed of the tokens to come. Changed by Speculation only."""

    pace: Pace
    lookup: PromptLookup | None
    """None where a draft model guesses."""
    drafted: list[int] = field(default_factory=list)
    """Tokens that the draft model takes to follow those known."""


class Request:
    """One sequence from arrival to end. Changed by the scheduler only.

    Args:
        message: what the front end asked for.
        sort_key: lower runs first; of two equal ones never both exist.
    """

    def __init__(self, message: EngineRequest, sort_key: tuple[int, int]) -> None:
        self.request_id = message.request_id
        self.params = message.sampling_params
        self.eos_token_ids = frozenset(message.eos_token_ids)
        self.sort_key = sort_key
        self.state = RequestState.WAITING
        self.token_ids = message.prompt_token_ids + message.output_token_ids
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.num_computed_tokens = 0
        """Tokens whose keys and values are in the cache, or will be once the batches in flight are done; proposed ones
        among them until it is known which come true."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the prefix cache when it first ran."""
        self.num_prompt_logprobs_sent = message.num_prompt_logprobs_sent
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.row: int | None = None
        self.num_in_flight = 0
        """Batches in flight that it is part of."""
        self.num_awaited_tokens = 0
        """Tokens that those will sample, and that others after them may compute before they are known."""
        self.blocks: BlockTables | None = None
        self.guesses: Guesses | None = None
        """None until something is to be guessed."""
        self._keys: list[bytes] = []

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def held_row(self) -> int:
        """Its row of the workers' tables, while it has one."""
        assert self.row is not None
        return self.row

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens still to be computed before the next one can be sampled. None while that one is in flight, unless it
        is awaited: 0, or less with proposed tokens.
        """
        return len(self.token_ids) + self.num_awaited_tokens - self.num_computed_tokens

    @property
    def stop_token_ids(self) -> list[int]:
        """All tokens that may end it: end-of-sequence and stop tokens."""
        return [*self.eos_token_ids, *(self.params.stop_token_ids or [])]

    def block_keys(self, block_size: int) -> list[bytes]:
        """Content keys of its whole blocks so far."""
        extend_keys(self._keys, self.token_ids, block_size)
        return self._keys

    def append(self, token_id: int, *, max_model_len: int) -> None:
        """Take a sampled token and see whether it ends the request."""
        self.token_ids.append(token_id)
        if self.num_output_tokens >= self.params.min_tokens:
            if token_id in self.eos_token_ids:
                self.finish(FinishReason.STOP)
                return
            if token_id in (self.params.stop_token_ids or ()):
                self.finish(FinishReason.STOP, stop_reason=token_id)
                return
        if self.is_full(self.num_tokens, max_model_len=max_model_len):
            self.finish(FinishReason.LENGTH)

    def is_full(self, num_tokens: int, *, max_model_len: int) -> bool:
        """Whether it ends with so many tokens, whatever these are."""
        max_tokens = self.params.max_tokens
        return num_tokens >= max_model_len or (
            max_tokens is not None and num_tokens - self.num_prompt_tokens >= max_tokens
        )

    def finish(self, reason: FinishReason, *, stop_reason: int | None = None) -> None:
        """End it. What it holds is the scheduler's to release."""
        self.state = RequestState.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

"""What the scheduler is told about guessing ahead: which tokens to verify, how many to let the draft model propose.

Guesses are never more than an offer. A step has them only where blocks are free and nobody is preempted for them, and
the worker decides which of them come true (worker/verify.py). No torch here.

A step of few tokens takes the time of reading the weights, however many tokens there are; a step of many the time of
multiplying with each. Guesses are free up to where the two meet, so a step of decodes is filled up to there, to equal
parts, and with more decodes than that nobody guesses.
"""

from __future__ import annotations

import logging

from shardwright.config import SpeculativeConfig
from shardwright.engine.messages import EngineInfo
from shardwright.engine.pace import Pace
from shardwright.engine.prompt_lookup import PromptLookup
from shardwright.engine.request import Guesses, Request

logger = logging.getLogger(__name__)

CPU_STEP_TOKENS = 8
"""Tokens of a step that take as long to multiply as the weights to read: GEMM rate over memory bandwidth, with weights
of two bytes. 5.7 were measured with AVX2, 12 with AVX512-BF16."""

GPU_STEP_TOKENS = 256
"""The same, by the data sheets of current GPUs."""


class Speculation:
    """Guesses for the sequences of a scheduler.

    Args:
        config: with a method other than "none".
        step_tokens: tokens up to which a step of decodes is filled.
        max_model_len: of the engine.
    """

    def __init__(self, config: SpeculativeConfig, *, step_tokens: int, max_model_len: int) -> None:
        self.drafts = config.method == "draft"
        """Whether a draft model proposes."""
        self.num_proposed = 0
        self.num_accepted = 0
        self._config = config
        self._step_tokens = step_tokens
        self._max_model_len = max_model_len

    def most(self, num_decodes: int) -> int:
        """Most tokens to guess for each of so many decodes that share a step."""
        return max(0, self._step_tokens // max(1, num_decodes) - 1)

    def propose(self, request: Request, most: int) -> list[int]:
        """Tokens that may follow those of a request whose last known token is to be computed."""
        guesses = self._guesses(request)
        most = min(most, guesses.pace.length, self._room(request, request.num_tokens))
        if most <= 0:
            return []
        if guesses.lookup is not None:
            return guesses.lookup.propose(request.token_ids, most)
        return guesses.drafted[:most]

    def num_to_draft(self, request: Request, most: int, *, num_proposed: int) -> int:
        """How many tokens the draft model shall propose for the step after this one.

        Args:
            request: that gets a token in this step.
            most: as of `most`.
            num_proposed: tokens verified in this step.
        """
        length = self._guesses(request).pace.length_after(guesses_now=num_proposed > 0)
        return max(0, min(most, length, self._room(request, request.num_tokens + 1)))

    def take(self, request: Request, *, num_proposed: int, num_accepted: int, drafted: list[int]) -> None:
        """Take in what became of a request's guesses in a step in which it got a token.

        Args:
            num_proposed: tokens that were verified.
            num_accepted: those that came true, one after another.
            drafted: what the draft model proposes for the next step.
        """
        self.num_proposed += num_proposed
        self.num_accepted += num_accepted
        guesses = self._guesses(request)
        guesses.pace.take(num_proposed, num_accepted)
        guesses.drafted = drafted

    def stop(self, request: Request) -> None:
        """Guess nothing more for a request."""
        self._guesses(request).pace.stop()

    def _guesses(self, request: Request) -> Guesses:
        if request.guesses is None:
            config, lookup = self._config, None
            if not self.drafts:
                lookup = PromptLookup(longest=config.prompt_lookup_max, shortest=config.prompt_lookup_min)
            request.guesses = Guesses(Pace(config.num_speculative_tokens), lookup)
        return request.guesses

    def _room(self, request: Request, num_tokens: int) -> int:
        """Guesses that are of use behind so many tokens: the step that verifies them brings one token by itself."""
        room = self._max_model_len - num_tokens - 1
        if request.params.max_tokens is not None:
            room = min(room, request.params.max_tokens - (num_tokens - request.num_prompt_tokens) - 1)
        return room


def open_speculation(config: SpeculativeConfig, info: EngineInfo) -> Speculation | None:
    """What an engine guesses with; None if it does not, or cannot."""
    if config.method == "none":
        return None
    if not info.can_rewind:
        logger.warning(
            "no tokens are guessed ahead: on rung %r what a wrong guess leaves behind cannot be taken back",
            info.attention_rung,
        )
        return None
    step_tokens = config.speculative_step_tokens
    if step_tokens is None:
        step_tokens = CPU_STEP_TOKENS if info.device.startswith("cpu") else GPU_STEP_TOKENS
    return Speculation(
        config, step_tokens=min(step_tokens, info.max_num_batched_tokens), max_model_len=info.max_model_len
    )

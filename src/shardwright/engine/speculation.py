"""What the scheduler is told about guessing ahead: which tokens to verify, how many to let the draft model propose.

Guesses are never more than an offer: they get blocks that are free when every decode of a step has its own, and the
worker finds out which of them come true (worker/verify.py). No torch here.

A step of few tokens takes the time of reading the weights, however many tokens there are; a step of many takes the time
of multiplying with each. Guesses are free up to where the two meet. So a step of decodes is filled up to there, in
equal parts, and with more than half as many decodes nobody guesses.
"""

from __future__ import annotations

import logging

from shardwright.config import SpeculativeConfig
from shardwright.engine.batch_builder import BatchBuilder
from shardwright.engine.in_flight import ScheduledTokens
from shardwright.engine.memory import SequenceMemory
from shardwright.engine.messages import EngineInfo
from shardwright.engine.pace import Pace
from shardwright.engine.prompt_lookup import PromptLookup
from shardwright.engine.request import Guesses, Request
from shardwright.worker.batch import StepResult

logger = logging.getLogger(__name__)


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

    def add_proposals(self, step: BatchBuilder, memory: SequenceMemory) -> None:
        """Let the decodes of a step verify proposed tokens, where blocks are free.

        Args:
            step: with its decodes, and nothing else yet.
            memory: of the scheduler.
        """
        most = self.most(len(step))
        for part in step.parts if most else []:
            proposed = self.propose(part.request, min(most, step.budget))
            if proposed and memory.grow(part.request, part.end + len(proposed)):
                step.extend(part.request, proposed, memory.news(part.request))

    def ask_for_drafts(self, step: BatchBuilder, memory: SequenceMemory) -> None:
        """Let the draft model propose tokens for the requests that get one in a step, where blocks are free.

        Args:
            step: with all its sequences.
            memory: of the scheduler.
        """
        if not self.drafts:
            return
        sampling = [part for part in step.parts if part.known_end == part.request.num_tokens]
        most = self.most(len(sampling))
        for part in sampling:
            num_tokens = self.num_to_draft(part.request, most, num_proposed=len(part.proposed))
            if num_tokens and memory.grow(part.request, min(part.end + num_tokens, self._max_model_len)):
                step.let_propose(part.request, num_tokens, memory.news(part.request))

    def take(self, part: ScheduledTokens, place: int, result: StepResult) -> None:
        """Take in what became of the guesses for a request in a step in which it was to get a token.

        Args:
            part: its part of the step.
            place: of the request in `result`.
            result: of the step.
        """
        num_proposed, num_accepted = len(part.proposed), result.num_accepted.get(place, 0)
        self.num_proposed += num_proposed
        self.num_accepted += num_accepted
        guesses = self._guesses(part.request)
        guesses.pace.take(num_proposed, num_accepted)
        guesses.drafted = result.proposals.get(place, [])
        if place in result.errors:
            guesses.pace.stop()

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
    step_tokens = config.step_tokens(info.device)
    logger.info(
        "up to %d tokens are guessed ahead by %s, in steps of up to %d tokens",
        config.num_speculative_tokens,
        config.speculative_model or "prompt lookup",
        step_tokens,
    )
    return Speculation(
        config, step_tokens=min(step_tokens, info.max_num_batched_tokens), max_model_len=info.max_model_len
    )

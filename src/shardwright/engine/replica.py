"""One of several cores, as the front end sees it, and what it is at work on."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from shardwright.engine.client import CoreClient
from shardwright.engine.messages import EngineOutput, EngineRequest, PoolingRequest, SchedulerStats


@dataclass(slots=True)
class Assignment:
    """A sequence, or a text to be read whole, that a replica has to do. The front end knows all that came of it, so
    another replica can go on with it.
    """

    request: EngineRequest | PoolingRequest
    """As this replica got it."""
    replica: int
    keys: list[bytes] = field(default_factory=list)
    """Of its whole blocks, as far as anybody asked."""
    new_token_ids: list[int] = field(default_factory=list)
    """What this replica has made of it."""
    num_prompt_logprobs: int = 0
    """Of those, what this replica has sent."""

    @property
    def token_ids(self) -> list[int]:
        """All tokens known of it."""
        request = self.request
        before = request.output_token_ids if isinstance(request, EngineRequest) else []
        return request.prompt_token_ids + before + self.new_token_ids

    def take(self, output: EngineOutput) -> None:
        """Note what a step brought."""
        self.new_token_ids += output.new_token_ids
        self.num_prompt_logprobs += len(output.prompt_logprobs or [])

    def continuation(self) -> EngineRequest | PoolingRequest:
        """What another replica has to do."""
        request = self.request
        if isinstance(request, PoolingRequest):
            return request
        return msgspec.structs.replace(
            request,
            output_token_ids=request.output_token_ids + self.new_token_ids,
            num_prompt_logprobs_sent=request.num_prompt_logprobs_sent + self.num_prompt_logprobs,
        )


@dataclass(slots=True)
class Replica:
    """A core process and what is known of it."""

    client: CoreClient
    is_ready: bool = False
    """It has loaded its model, and lives as far as anybody knows."""
    is_given_up: bool = False
    """It was lost too often."""
    load: int = 0
    """Tokens of its assignments."""
    num_losses: int = 0
    """Since it last brought a token."""
    latest: SchedulerStats = field(default_factory=SchedulerStats)
    """As its core has told."""
    past: SchedulerStats = field(default_factory=SchedulerStats)
    """Counters of its cores that were lost."""

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats.total([self.past, self.latest])

    def bury(self) -> None:
        """Its core is gone."""
        self.is_ready = False
        self.num_losses += 1
        self.load = 0
        self.past = msgspec.structs.replace(
            self.stats,
            num_running=0,
            num_waiting=0,
            num_blocks=0,
            num_free_blocks=0,
            num_restarts=self.stats.num_restarts + 1,
        )
        self.latest = SchedulerStats()

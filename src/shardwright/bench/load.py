"""What a served load consists of: how many requests, when they arrive, and their prompts.

Arrivals are a Poisson process, as of many users who know nothing of each other: gaps are exponential, and a request
comes when it is due, whether or not earlier ones are answered. The same seed gives the same moments. Not covered:
sending them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from shardwright.bench.bound import Weights, step_seconds, workload_seconds
from shardwright.bench.machine import Machine
from shardwright.bench.workloads import Workload, prompt_token_ids
from shardwright.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Requests that arrive over time, each with as many tokens as the others."""

    rate: float
    """Requests a second, on average."""
    num_requests: int
    prompt_tokens: int
    """Per request."""
    output_tokens: int
    """Per request."""
    seed: int = 0
    """Of the arrivals."""
    first_prompt: int = 0
    """Number of the first standard prompt: loads that follow each other begin where the last one ended, so that no
    prefix of theirs is cached."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise UsageError(f"the rate is {self.rate:g} but must be a number of requests per second over 0")

    @property
    def name(self) -> str:
        return f"serve-{self.rate:g}"

    @property
    def longest(self) -> int:
        """Tokens of a request, prompt and output together."""
        return self.prompt_tokens + self.output_tokens

    def arrivals_s(self) -> list[float]:
        """When each request is due, in seconds from the first, which is due at once."""
        generator = random.Random(self.seed)
        moments = [0.0]
        for _ in range(self.num_requests - 1):
            moments.append(moments[-1] + generator.expovariate(self.rate))
        return moments

    def prompts(self, vocab_size: int | None) -> list[list[int]]:
        """Standard prompts, their ids folded into the vocabulary; None takes it to be large enough."""
        numbers = range(self.first_prompt, self.first_prompt + self.num_requests)
        workload = Workload(
            name=self.name,
            prompts=[prompt_token_ids(number, self.prompt_tokens) for number in numbers],
            output_tokens=self.output_tokens,
        )
        return (workload.for_vocabulary(vocab_size) if vocab_size is not None else workload).prompts


def loads(
    rates: list[float], *, num_requests: int, prompt_tokens: int, output_tokens: int, seed: int, first_prompt: int = 0
) -> list[Load]:
    """One load for each rate, with prompts of its own. Raises UsageError for a rate that is none."""
    return [
        Load(
            rate=rate,
            num_requests=num_requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
            first_prompt=first_prompt + index * num_requests,
        )
        for index, rate in enumerate(rates)
    ]


def load_seconds(load: Load, weights: Weights, machine: Machine) -> float:
    """The least time from the first arrival to the last token.

    Nothing is computed faster than all together, and the last request is not served before it comes.
    """
    together = Workload(name=load.name, prompts=load.prompts(None), output_tokens=load.output_tokens)
    alone_s = step_seconds(load.prompt_tokens, weights, machine)
    alone_s += (load.output_tokens - 1) * step_seconds(1, weights, machine)
    return max(workload_seconds(together, weights, machine), load.arrivals_s()[-1] + alone_s)

"""The standard workloads: the same prompts, as token ids, for every engine that is compared.

Prompt `i` has the token ids `(7*i + 13*j) % 40000 + 100` for `j` in its length; all are greedy and go on past
end-of-sequence. Not covered: running them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shardwright.errors import UsageError

LARGEST_TOKEN_ID = 40099


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests that arrive together, each with the same number of output tokens."""

    name: str
    prompts: list[list[int]]
    output_tokens: int
    """Per request."""
    headline: Literal["output", "total"] = "output"
    """Which tokens its speed is quoted in: those generated, or prompt and output together where prefill dominates."""
    common_tokens: int = 0
    """Leading tokens that all prompts share, which a prefix cache computes once."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return len(self.prompts) * self.output_tokens

    @property
    def num_headline_tokens(self) -> int:
        return self.num_output_tokens + (self.num_prompt_tokens if self.headline == "total" else 0)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(map(len, self.prompts)) + self.output_tokens

    def for_vocabulary(self, vocab_size: int) -> Workload:
        """The same with ids that a model of this vocabulary has: folded into it where it is smaller than the ids."""
        if vocab_size > LARGEST_TOKEN_ID:
            return self
        return dataclasses.replace(self, prompts=[[token % vocab_size for token in prompt] for prompt in self.prompts])


def prompt_token_ids(i: int, length: int) -> list[int]:
    """The standard prompt number `i`."""
    return [(7 * i + 13 * j) % 40000 + 100 for j in range(length)]


def uniform(
    name: str, count: int, length: int, output_tokens: int, *, headline: Literal["output", "total"] = "output"
) -> Workload:
    """`count` requests of one length, without anything in common."""
    prompts = [prompt_token_ids(i, length) for i in range(count)]
    return Workload(name=name, prompts=prompts, output_tokens=output_tokens, headline=headline)


def shared_prefix(name: str, count: int, common: int, own: int, output_tokens: int) -> Workload:
    """`count` requests that begin with the same `common` tokens and end with `own` of their own."""
    prefix = prompt_token_ids(0, common)
    prompts = [prefix + prompt_token_ids(i + 1, own) for i in range(count)]
    return Workload(name=name, prompts=prompts, output_tokens=output_tokens, headline="total", common_tokens=common)


DECODE = ("decode-1", "decode-8", "decode-32", "mixed-32")
PREFILL = ("prefill", "shared-prefix")
ALL = (*DECODE, *PREFILL)

WORKLOADS = {
    workload.name: workload
    for workload in (
        uniform("decode-1", 1, 32, 128),
        uniform("decode-8", 8, 32, 128),
        uniform("decode-32", 32, 32, 128),
        uniform("mixed-32", 32, 128, 64),
        uniform("prefill", 4, 1024, 1, headline="total"),
        shared_prefix("shared-prefix", 16, 1024, 32, 32),
    )
}


def choose(names: Iterable[str]) -> list[Workload]:
    """The workloads of these names. Raises UsageError for an unknown one."""
    names = list(names)
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise UsageError(f"no workload is called {unknown[0]!r}: choose from {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in names]

"""Token counts of one HTTP request."""

from __future__ import annotations

import msgspec

from shardwright.outputs import RequestOutput
from shardwright.server.responses import PromptTokensDetails, Usage
from shardwright.server.schemas import StreamOptions


class UsageCounter:
    """Adds up the tokens of outputs, whole ones or deltas.

    Args:
        options: the stream's; None for a response that does not stream.
    """

    def __init__(self, options: StreamOptions | None = None) -> None:
        self.wants_final = bool(options and options.include_usage)
        self.wants_continuous = bool(options and options.continuous_usage_stats and options.include_usage)
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0

    def feed(self, index: int, output: RequestOutput) -> None:
        """Count a delta, or all, of prompt `index`."""
        self._prompt_tokens[index] = len(output.prompt_token_ids)
        self._cached_tokens[index] = output.metrics.num_cached_tokens
        self._completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)

    def usage(self) -> Usage:
        prompt_tokens = sum(self._prompt_tokens.values())
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached_tokens.values())),
        )

    def of_event(self) -> Usage | msgspec.UnsetType | None:
        """What an event of a stream carries: null before the last one, if usage was asked for at all."""
        if not self.wants_final:
            return msgspec.UNSET
        return self.usage() if self.wants_continuous else None

"""What the server uses of the engine: `AsyncLLM` provides it, tests put a small deterministic engine in its place."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol

from shardwright.engine.messages import EngineInfo, SchedulerStats
from shardwright.outputs import ClassificationOutput, EmbeddingOutput, RequestOutput, ScoreOutput
from shardwright.sampling_params import SamplingParams

Prompt = str | list[int]


class ServedTokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]: ...


class ServedEngine(Protocol):
    """An engine that serves one model."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def tokenizer(self) -> ServedTokenizer: ...

    @property
    def stats(self) -> SchedulerStats: ...

    @property
    def replica_stats(self) -> list[tuple[SchedulerStats, bool]]:
        """Per replica, the state of its scheduler, and whether it takes requests."""
        ...

    @property
    def is_alive(self) -> bool: ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: Literal["cumulative", "delta"] = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Deltas of one request. Its errors are raised at the first step; closing the generator aborts it."""
        ...

    async def embed(
        self, prompts: list[Prompt], *, dimensions: int | None = None, truncate_prompt_tokens: int | None = None
    ) -> list[EmbeddingOutput]: ...

    async def classify(
        self, prompts: list[Prompt], *, truncate_prompt_tokens: int | None = None
    ) -> list[ClassificationOutput]: ...

    async def score(
        self,
        text_1: list[Prompt],
        text_2: list[Prompt] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoreOutput]: ...

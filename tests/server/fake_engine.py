"""A small engine that says the alphabet, or embeds: what the server's handlers need of an engine, without a model.

Tokens are ASCII characters, ids their codes. Completion `i` of a prompt goes on from its last character: after "abc" it
says "def…" if `i` is 0, "efg…" if `i` is 1, one token per step, until max_tokens or a stop token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

import msgspec

from shardwright.engine.messages import EngineInfo, SchedulerStats
from shardwright.engine.tasks import check_task
from shardwright.errors import EngineDeadError, PromptTooLongError, RequestError
from shardwright.outputs import (
    ClassificationOutput,
    CompletionOutput,
    EmbeddingOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)
from shardwright.sampling_params import SamplingParams

MAX_MODEL_LEN = 64
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

KNOWN: dict[str, Any] = {
    "model": "alphabet",
    "architecture": "AlphabetForCausalLM",
    "dtype": "float32",
    "device": "cpu",
    "num_parameters": 26,
    "weight_bytes": 104,
    "vocab_size": 128,
    "max_model_len": MAX_MODEL_LEN,
    "num_blocks": 32,
}
REQUIRED = [field for field in msgspec.structs.fields(EngineInfo) if field.required]
INFO = EngineInfo(**{field.name: field.type() for field in REQUIRED} | KNOWN)
"""What the server does not look at is empty."""


class AsciiTokenizer:
    """One token per character; a conversation reads `<role>content` per message."""

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if not self.has_chat_template and chat_template is None:
            raise RequestError("the tokenizer has no chat template", param="messages")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        text += "".join(f"[{name}={value}]" for name, value in kwargs.items())
        return self.encode((chat_template or "") + text + ("<assistant>" if add_generation_prompt else ""))


def alternatives(token_id: int, count: int) -> dict[int, Logprob]:
    """A chosen token that was third best, and the `count` likeliest."""
    best = {rank: Logprob(-0.1 * rank, rank, f"#{rank}") for rank in range(1, count + 1)}
    return {token_id: Logprob(-0.3, 3, chr(token_id))} | {1000 + rank: one for rank, one in best.items() if rank != 3}


class AlphabetEngine:
    """Generates letters, one step each time the event loop comes round, or each time `steps` is released."""

    def __init__(self, *, has_chat_template: bool = True, task: str = "generate") -> None:
        self.info = msgspec.structs.replace(INFO, task=task)
        self.tokenizer = AsciiTokenizer(has_chat_template=has_chat_template)
        self.stats = SchedulerStats(num_blocks=INFO.num_blocks, num_free_blocks=INFO.num_blocks)
        self.other_replicas: list[tuple[SchedulerStats, bool]] = []
        self.is_alive = True
        self.requests: dict[str, tuple[str | list[int], SamplingParams, int]] = {}
        self.running: set[str] = set()
        self.aborted: set[str] = set()
        self.steps: asyncio.Semaphore | None = None
        """When set, every step takes one permit."""
        self.dies_after: int | None = None
        """Steps of a request after which the engine is dead."""

    @property
    def replica_stats(self) -> list[tuple[SchedulerStats, bool]]:
        return [(self.stats, True), *self.other_replicas]

    async def generate(
        self,
        prompt: str | list[int],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: Literal["cumulative", "delta"] = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        assert stream == "delta"
        assert request_id is not None
        params = sampling_params or SamplingParams()
        self.requests[request_id] = (prompt, params, priority)
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._check(token_ids)
        self.running.add(request_id)
        try:
            async for output in self._steps(request_id, prompt, token_ids, params):
                yield output
        except GeneratorExit:
            self.aborted.add(request_id)
            raise
        except asyncio.CancelledError:
            self.aborted.add(request_id)
            raise
        finally:
            self.running.discard(request_id)

    async def embed(
        self,
        prompts: Sequence[str | list[int]],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingOutput]:
        """A text's embedding has its length, its first and its last token."""
        check_task(self.info, "embed")
        outputs = []
        for prompt in prompts:
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            token_ids = token_ids[:truncate_prompt_tokens]
            self._check(token_ids)
            numbers = [float(len(token_ids)), float(token_ids[0]), float(token_ids[-1])][:dimensions]
            text = prompt if isinstance(prompt, str) else None
            outputs.append(EmbeddingOutput(prompt=text, prompt_token_ids=token_ids, embedding=numbers))
        return outputs

    async def classify(
        self, prompts: Sequence[str | list[int]], *, truncate_prompt_tokens: int | None = None
    ) -> list[ClassificationOutput]:
        """A text is "short" or "long"."""
        check_task(self.info, "classify")
        return [
            ClassificationOutput(
                prompt=None,
                prompt_token_ids=list(range(len(prompt))),
                logits=[0.0, 1.0] if len(prompt) > 3 else [1.0, 0.0],
                probs=[0.25, 0.75] if len(prompt) > 3 else [0.75, 0.25],
                label="long" if len(prompt) > 3 else "short",
            )
            for prompt in prompts
        ]

    async def score(
        self,
        text_1: Sequence[str | list[int]],
        text_2: Sequence[str | list[int]] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoreOutput]:
        """A text has its length; a pair the share of the first text's letters that the second has."""
        check_task(self.info, "score")
        outputs = []
        for place, other in enumerate(text_1 if text_2 is None else text_2):
            one = text_1[place if len(text_1) > 1 else 0]
            if not other:
                raise RequestError("the prompt is empty", param="text_1" if text_2 is None else f"text_2[{place}]")
            score = len(one) if text_2 is None else len({*one} & {*other}) / max(len({*one}), 1)
            token_ids = list(range(len(one) + (0 if text_2 is None else len(other[:truncate_prompt_tokens]))))
            outputs.append(ScoreOutput(prompt_token_ids=token_ids, score=float(score)))
        return outputs

    def _check(self, token_ids: list[int]) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine process is gone")
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if any(not 0 <= token < INFO.vocab_size for token in token_ids):
            raise RequestError("token id out of range", param="prompt")
        if len(token_ids) >= MAX_MODEL_LEN:
            raise PromptTooLongError(
                f"prompt has {len(token_ids)} tokens but max_model_len is {MAX_MODEL_LEN}", param="prompt"
            )

    async def _steps(
        self, request_id: str, prompt: str | list[int], token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        room = MAX_MODEL_LEN - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        for step in range(max_tokens):
            if self.steps is None:
                await asyncio.sleep(0)
            else:
                await self.steps.acquire()
            if self.dies_after is not None and step >= self.dies_after:
                self.is_alive = False
                raise EngineDeadError("the engine process is gone")
            last = step == max_tokens - 1
            completions = [self._completion(index, step, token_ids, params, last) for index in range(params.n)]
            last = last or all(one.finish_reason for one in completions)
            output = RequestOutput(
                request_id=request_id,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=token_ids,
                outputs=completions,
                finished=last,
                metrics=RequestMetrics(num_cached_tokens=len(token_ids) // 4 * 4),
            )
            if step == 0 and params.prompt_logprobs is not None:
                rows = [alternatives(token, params.prompt_logprobs) for token in token_ids[1:]]
                output.prompt_logprobs = [None, *rows]
            yield output
            if last:
                return

    def _completion(
        self, index: int, step: int, token_ids: list[int], params: SamplingParams, last: bool
    ) -> CompletionOutput:
        start = ALPHABET.find(chr(token_ids[-1])) + 1
        token = ord(ALPHABET[(start + index + step) % 26])
        stopped = token in (params.stop_token_ids or [])
        return CompletionOutput(
            index=index,
            text="" if stopped else chr(token),
            token_ids=[token],
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH if last else None,
            stop_reason=token if stopped else None,
            logprobs=None if params.logprobs is None else [alternatives(token, params.logprobs)],
        )

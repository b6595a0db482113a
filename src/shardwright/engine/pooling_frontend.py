"""The half of the engine that owns text, for models that read whole texts: tokens for the core, outputs for callers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from shardwright.engine.input_processor import Prompt, as_prompts, check_token_ids, prompt_text, read_prompt
from shardwright.engine.messages import EngineInfo, PoolingInfo, PoolingRequest
from shardwright.engine.pooling_outputs import Vector, check_dimensions, cosine, cut, sigmoid, softmax
from shardwright.engine.tasks import check_task
from shardwright.errors import PromptTooLongError, RequestError
from shardwright.models.tokenizer import Encoding, Tokenizer
from shardwright.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class PoolingJob(Generic[Output]):
    """Texts for the core, and what to make of its answers."""

    requests: list[PoolingRequest]
    finish: Callable[[list[Vector]], list[Output]]

    @classmethod
    def of_each(
        cls, requests: list[PoolingRequest], finish: Callable[[PoolingRequest, Vector], Output]
    ) -> PoolingJob[Output]:
        """A job that gives an output for each text."""
        return cls(requests, lambda vectors: [finish(*one) for one in zip(requests, vectors, strict=True)])

    def outputs(self, values: Mapping[str, bytes]) -> list[Output]:
        """What callers get, in order, from the core's answers by request id."""
        return self.finish([np.frombuffer(values[one.request_id], dtype=np.float32) for one in self.requests])


class PoolingFrontend:
    """Makes jobs of what callers hand in.

    Args:
        tokenizer: of the model.
        info: what the core found out at start.
    """

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._numbers = itertools.count()

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, dimensions: int | None, truncate_prompt_tokens: int | None
    ) -> PoolingJob[EmbeddingOutput]:
        """Embed prompts. Raises RequestError naming the field at fault."""
        check_task(self._info, "embed")
        pooling = self._pooling
        size = check_dimensions(dimensions, pooling)
        texts, requests = self._requests(as_prompts(prompts), truncate_prompt_tokens)

        def finish(request: PoolingRequest, vector: Vector) -> EmbeddingOutput:
            return EmbeddingOutput(
                prompt=texts[request.request_id],
                prompt_token_ids=request.prompt_token_ids,
                embedding=cut(vector, size, normalize=pooling.normalize).tolist(),
            )

        return PoolingJob.of_each(requests, finish)

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, truncate_prompt_tokens: int | None
    ) -> PoolingJob[ClassificationOutput]:
        """Classify prompts. Raises RequestError naming the field at fault."""
        check_task(self._info, "classify")
        pooling = self._pooling
        texts, requests = self._requests(as_prompts(prompts), truncate_prompt_tokens)

        def finish(request: PoolingRequest, logits: Vector) -> ClassificationOutput:
            return ClassificationOutput(
                prompt=texts[request.request_id],
                prompt_token_ids=request.prompt_token_ids,
                logits=logits.tolist(),
                probs=(sigmoid(logits) if pooling.is_multi_label else softmax(logits)).tolist(),
                label=pooling.labels[int(logits.argmax())],
            )

        return PoolingJob.of_each(requests, finish)

    def score(
        self,
        text_1: Prompt | Sequence[Prompt],
        text_2: Prompt | Sequence[Prompt] | None,
        *,
        truncate_prompt_tokens: int | None,
    ) -> PoolingJob[ScoreOutput]:
        """Score texts, or pairs of them. Raises RequestError naming `text_1`, `text_2` or the option at fault."""
        check_task(self._info, "score")
        firsts, seconds = as_prompts(text_1), None if text_2 is None else as_prompts(text_2)
        if seconds is not None and len(firsts) not in (1, len(seconds)):
            raise RequestError(
                f"{len(firsts)} and {len(seconds)} texts make no pairs: give as many of both, or one and many",
                param="text_2",
            )
        if self._info.task == "embed":
            return self._similarities(firsts, seconds, truncate_prompt_tokens)
        pooling = self._pooling
        if pooling.size != 1:
            raise RequestError(
                f"{self._info.model} has {pooling.size} labels, and a score is that of a single one: use classify",
                param="model",
            )
        is_logit = text_2 is None or pooling.scores_are_logits
        if seconds is None:
            _, requests = self._requests(firsts, truncate_prompt_tokens, field="text_1")
        else:
            firsts = firsts * len(seconds) if len(firsts) == 1 else firsts
            _, requests = self._requests(firsts, truncate_prompt_tokens, others=seconds, field="text_2")

        def finish(request: PoolingRequest, logits: Vector) -> ScoreOutput:
            value = logits if is_logit else sigmoid(logits)
            return ScoreOutput(prompt_token_ids=request.prompt_token_ids, score=float(value[0]))

        return PoolingJob.of_each(requests, finish)

    def _similarities(
        self, firsts: Sequence[Prompt], seconds: Sequence[Prompt] | None, truncate: int | None
    ) -> PoolingJob[ScoreOutput]:
        """How alike the embeddings of pairs are. One first text is read once, for all."""
        if seconds is None:
            raise RequestError(
                f"{self._info.model} embeds texts, and scores how alike two are: give the other text", param="text_2"
            )
        _, lefts = self._requests(firsts, truncate, field="text_1")
        _, rights = self._requests(seconds, truncate, field="text_2")

        def finish(vectors: list[Vector]) -> list[ScoreOutput]:
            read = list(zip([*lefts, *rights], vectors, strict=True))
            before, after = read[: len(lefts)], read[len(lefts) :]
            before = before * len(after) if len(before) == 1 else before
            return [
                ScoreOutput(
                    prompt_token_ids=[*one.prompt_token_ids, *other.prompt_token_ids], score=cosine(vector, vector_2)
                )
                for (one, vector), (other, vector_2) in zip(before, after, strict=True)
            ]

        return PoolingJob([*lefts, *rights], finish)

    @property
    def _pooling(self) -> PoolingInfo:
        assert self._info.pooling is not None
        return self._info.pooling

    def _requests(
        self,
        prompts: Sequence[Prompt],
        truncate: int | None,
        *,
        others: Sequence[Prompt] | None = None,
        field: str = "prompt",
    ) -> tuple[dict[str, str | None], list[PoolingRequest]]:
        """Texts by request id, and requests, in order; errors name the caller's field."""
        limit = self._truncation(truncate)
        texts: dict[str, str | None] = {}
        requests = []
        for place, prompt in enumerate(prompts):
            try:
                encoding = self._encode(prompt, None if others is None else others[place], limit)
            except RequestError as exc:
                if exc.param == "prompt":
                    exc.param = f"{field}[{place}]" if len(prompts) > 1 else field
                raise
            request_id = f"text-{next(self._numbers)}"
            texts[request_id] = prompt_text(prompt)
            requests.append(
                PoolingRequest(
                    request_id=request_id,
                    prompt_token_ids=encoding.token_ids,
                    token_type_ids=encoding.token_type_ids,
                )
            )
        return texts, requests

    def _truncation(self, asked: int | None) -> int | None:
        longest = self._info.max_model_len
        if asked is not None and (asked == 0 or not -1 <= asked <= longest):
            raise RequestError(
                f"truncate_prompt_tokens is {asked} but must be from 1 to max_model_len, which is {longest}, or -1 for "
                "just that",
                param="truncate_prompt_tokens",
            )
        return longest if asked == -1 else asked

    def _encode(self, prompt: Prompt, other: Prompt | None, limit: int | None) -> Encoding:
        value, second = read_prompt(prompt), None if other is None else read_prompt(other)
        if isinstance(value, str) and not isinstance(second, list):
            encoding = self._tokenizer.encode_whole(value, second, max_length=limit)
        elif isinstance(value, list) and second is None:
            encoding = Encoding(value[:limit], None)
        else:
            raise RequestError(
                "both texts of a pair must be strings: the model puts tokens between them", param="prompt"
            )
        check_token_ids(encoding.token_ids, self._info.vocab_size)
        length, longest = len(encoding.token_ids), self._info.max_model_len
        if length > longest:
            raise PromptTooLongError(
                f"the text has {length:,} tokens but the model reads at most {longest:,}: shorten it, or pass "
                "truncate_prompt_tokens=-1 to read its beginning",
                param="prompt",
            )
        return encoding

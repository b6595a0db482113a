"""From the core's outputs of sequences to the outputs of requests, as callers see them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardwright.engine.completion import Completion, readable_logprobs
from shardwright.engine.messages import EngineOutput, TokenLogprobs
from shardwright.errors import RequestError
from shardwright.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from shardwright.sampling_params import SamplingParams

if TYPE_CHECKING:
    from shardwright.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ProcessedOutputs:
    """What one step means for requests."""

    request_outputs: list[RequestOutput]
    """One for each request with news: only what is new, and only of completions that have something new.

    `finished` is set on a request's last one. Prompt log-probabilities come whole, with the first that has them all.
    """
    abort_ids: list[str]
    """Sequences that a stop string ended while the core goes on with them."""


class OutputProcessor:
    """Knows the requests under way, and turns what a step brought for their sequences into text.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}
        self._of_child: dict[str, _Request] = {}

    @property
    def num_unfinished(self) -> int:
        """Requests under way."""
        return len(self._requests)

    def add(
        self,
        request_id: str,
        *,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        child_ids: Sequence[str],
        arrival_time: float,
    ) -> None:
        """Register a request before the core may answer.

        Args:
            request_id: the caller's.
            prompt: its text, if it was given as text.
            prompt_token_ids: the prompt as the core has it.
            params: as the caller gave them.
            child_ids: ids of its sequences, by index of the completion.
            arrival_time: on the clock of `process`.

        Raises: RequestError if an id is in use.
        """
        if request_id in self._requests or any(child_id in self._of_child for child_id in child_ids):
            raise RequestError(
                f"request id {request_id!r} is in use: choose another, or wait for its end", param="request_id"
            )
        request = _Request(
            self._tokenizer,
            request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params,
            child_ids=child_ids,
            arrival_time=arrival_time,
        )
        self._requests[request_id] = request
        self._of_child |= dict.fromkeys(child_ids, request)

    def process(self, outputs: Iterable[EngineOutput], now: float) -> ProcessedOutputs:
        """Take what a step brought; outputs of sequences that have ended or are unknown are ignored.

        Args:
            outputs: of the step.
            now: a clock in seconds.
        """
        news: dict[str, list[CompletionOutput]] = {}
        abort_ids: list[str] = []
        for output in outputs:
            request = self._of_child.get(output.request_id)
            if request is None:
                continue
            completion = request.take(output, now)
            if completion is None:
                continue
            news.setdefault(request.request_id, []).append(completion)
            if completion.finish_reason is not None:
                del self._of_child[output.request_id]
                if output.finish_reason is None:
                    abort_ids.append(output.request_id)
        return ProcessedOutputs([self._tell(request_id, parts, now) for request_id, parts in news.items()], abort_ids)

    def abort(self, request_id: str) -> list[str]:
        """Forget a request; returns its sequences that the core may still be at work on."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        child_ids = list(request.unfinished)
        for child_id in child_ids:
            del self._of_child[child_id]
        return child_ids

    def _tell(self, request_id: str, completions: list[CompletionOutput], now: float) -> RequestOutput:
        output = self._requests[request_id].output(completions, now)
        if output.finished:
            del self._requests[request_id]
        return output


class _Request:
    """One request under way."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request_id: str,
        *,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        child_ids: Sequence[str],
        arrival_time: float,
    ) -> None:
        self.request_id = request_id
        self.unfinished = {
            child_id: Completion(index, tokenizer, prompt_token_ids, params) for index, child_id in enumerate(child_ids)
        }
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._arrival_time = arrival_time
        self._first_child = child_ids[0]
        self._metrics = RequestMetrics()
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        """Those that came so far; None if none are wanted, or all have been told."""
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    def take(self, output: EngineOutput, now: float) -> CompletionOutput | None:
        """Take what a step brought for one of the sequences: its news, if it has a token or an end."""
        if output.request_id == self._first_child:  # later ones find the whole prompt in the cache, thanks to the first
            self._metrics.num_cached_tokens = max(self._metrics.num_cached_tokens, output.num_cached_tokens)
        self._metrics.num_proposed_tokens += output.num_proposed_tokens
        self._metrics.num_accepted_tokens += output.num_accepted_tokens
        self._take_prompt_logprobs(output.prompt_logprobs or [])
        if not output.new_token_ids and output.finish_reason is None:
            return None
        if output.new_token_ids and self._metrics.ttft_s is None:
            self._metrics.ttft_s = now - self._arrival_time
        completion = self.unfinished[output.request_id].take(output)
        if completion.finish_reason is not None:
            del self.unfinished[output.request_id]
        return completion

    def output(self, completions: list[CompletionOutput], now: float) -> RequestOutput:
        """What a step brought, as the caller sees it."""
        finished = not self.unfinished
        if finished:
            self._metrics.latency_s = now - self._arrival_time
        prompt_logprobs = None
        if self._prompt_logprobs is not None and len(self._prompt_logprobs) == len(self._prompt_token_ids):
            prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=completions,
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            metrics=dataclasses.replace(self._metrics),
        )

    def _take_prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        if self._prompt_logprobs is not None:
            self._prompt_logprobs += [readable_logprobs(entry, self._tokenizer) for entry in entries]

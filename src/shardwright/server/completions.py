"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shardwright.errors import RequestError
from shardwright.outputs import CompletionOutput, FinishReason, RequestOutput
from shardwright.sampling_params import SamplingParams
from shardwright.server.context import ServerContext
from shardwright.server.engine import Prompt, ServedTokenizer
from shardwright.server.generation import Outputs, gather, run_prompts
from shardwright.server.logprobs import completion_logprobs, joined, prompt_logprobs
from shardwright.server.openapi import json_body
from shardwright.server.parsing import read_body
from shardwright.server.responses import CompletionChoice, CompletionLogprobs, CompletionResponse
from shardwright.server.sampling import sampling_params
from shardwright.server.schemas import CompletionBody
from shardwright.server.streaming import EventStream, event
from shardwright.server.usage import UsageCounter


def completions_router(context: ServerContext) -> APIRouter:
    """The route of this file."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", openapi_extra=json_body(CompletionBody))
    async def create_completion(request: Request) -> Response:
        body = await read_body(request, CompletionBody, max_bytes=context.config.max_body_bytes)
        context.check_model(body.model, task="generate")
        prompts, params = split_prompts(body.prompt), completion_params(body)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        outputs = run_prompts(context, prompts, params, request_id=request_id, priority=body.priority or 0)
        if body.max_tokens == 0:
            outputs = without_generated(outputs)
        choices = ChoiceMaker(body, params, context.engine.tokenizer)
        response = CompletionResponse(id=request_id, created=int(time.time()), model=context.model_name, choices=[])
        headers = {"X-Request-Id": request_id}
        if body.stream:
            writer = CompletionEvents(response, choices, UsageCounter(body.stream_options))
            return EventStream(outputs, writer, context.lifecycle, headers=headers)
        usage = UsageCounter()
        for index, output in enumerate(await context.lifecycle.run(request.receive, gather(outputs, len(prompts)))):
            response.choices += choices.make(index, output)
            usage.feed(index, output)
        response.usage = usage.usage()
        return Response(msgspec.json.encode(response), headers=headers, media_type="application/json")

    return router


def split_prompts(prompt: str | list[str] | list[int] | list[list[int]], *, field: str = "prompt") -> list[Prompt]:
    """The prompts in a field of a request, which may be one or many. Raises RequestError if there is none."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(f"{field} is an empty list: give at least one text", param=field)
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


def completion_params(body: CompletionBody) -> SamplingParams:
    """Sampling parameters of a body; the API's `logprobs` covers the prompt too when it is echoed."""
    overrides: dict[str, int | None] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        overrides["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if body.max_tokens == 0:
        if not body.echo:
            raise RequestError("max_tokens is 0 but must be at least 1, unless echo is true", param="max_tokens")
        overrides["max_tokens"] = 1  # the engine makes one token at least; `without_generated` drops it
    return sampling_params(body, **overrides)


async def without_generated(outputs: Outputs) -> Outputs:
    """The same outputs with all that was generated taken out: the prompt is to be scored only."""
    async with aclosing(outputs):
        async for index, output in outputs:
            output.outputs = [
                CompletionOutput(
                    index=completion.index,
                    text="",
                    token_ids=[],
                    finish_reason=FinishReason.LENGTH if completion.finish_reason else None,
                    logprobs=None if completion.logprobs is None else [],
                )
                for completion in output.outputs
            ]
            yield index, output


class ChoiceMaker:
    """Makes the entries of `choices` from outputs, whole ones or deltas.

    Before the first piece of a choice it puts the echoed prompt, and it counts the characters for `text_offset`.
    """

    def __init__(self, body: CompletionBody, params: SamplingParams, tokenizer: ServedTokenizer) -> None:
        self._echo = bool(body.echo)
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._token_ids = bool(body.return_token_ids)
        self._params = params
        self._tokenizer = tokenizer
        self._text_length: dict[int, int] = {}
        self._logprobs_of_prompt: dict[int, CompletionLogprobs] = {}

    def make(self, prompt_index: int, output: RequestOutput) -> list[CompletionChoice]:
        """A choice for every completion that the output has news of."""
        if self._echo and self._params.logprobs is not None and output.prompt_logprobs is not None:
            self._logprobs_of_prompt[prompt_index] = completion_logprobs(
                output.prompt_token_ids, output.prompt_logprobs, offset=0, token_text=self._tokenizer.token_text
            )
        return [self._choice(prompt_index, output, completion) for completion in output.outputs]

    def _choice(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        index = prompt_index * self._params.n + completion.index
        text, logprobs = "", None
        is_first = index not in self._text_length
        if self._echo and is_first:
            text, logprobs = self._prompt_text(output), self._logprobs_of_prompt.get(prompt_index)
        offset = self._text_length.get(index, 0) + len(text)
        if completion.logprobs and self._params.logprobs is not None:
            generated = completion_logprobs(
                completion.token_ids, completion.logprobs, offset=offset, token_text=self._tokenizer.token_text
            )
            logprobs = generated if logprobs is None else joined(logprobs, generated)
        self._text_length[index] = offset + len(completion.text)
        return CompletionChoice(
            index=index,
            text=text + completion.text,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs or []) if self._prompt_logprobs else msgspec.UNSET,
            token_ids=completion.token_ids if self._token_ids else msgspec.UNSET,
            prompt_token_ids=output.prompt_token_ids if self._token_ids and is_first else msgspec.UNSET,
        )

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=self._params.skip_special_tokens)


class CompletionEvents:
    """The events of a streamed completion: one per step and choice, with the prompt's before the first."""

    def __init__(self, response: CompletionResponse, choices: ChoiceMaker, usage: UsageCounter) -> None:
        self._response = response
        self._choices = choices
        self._usage = usage

    def feed(self, index: int, output: RequestOutput) -> bytes:
        self._usage.feed(index, output)
        self._response.usage = self._usage.of_event()
        events = b""
        for choice in self._choices.make(index, output):
            has_news = choice.text or choice.logprobs is not None or choice.token_ids is not msgspec.UNSET
            if has_news or choice.finish_reason is not None:
                self._response.choices = [choice]
                events += event(self._response)
        return events

    def end(self) -> bytes:
        if not self._usage.wants_final:
            return b""
        self._response.choices, self._response.usage = [], self._usage.usage()
        return event(self._response)

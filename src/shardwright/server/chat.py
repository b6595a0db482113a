"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shardwright.errors import RequestError
from shardwright.outputs import CompletionOutput, RequestOutput
from shardwright.sampling_params import MAX_LOGPROBS, SamplingParams
from shardwright.server.context import ServerContext
from shardwright.server.generation import gather, run_prompts
from shardwright.server.logprobs import chat_logprobs, prompt_logprobs
from shardwright.server.openapi import json_body
from shardwright.server.parsing import read_body
from shardwright.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
)
from shardwright.server.sampling import sampling_params
from shardwright.server.schemas import ChatBody, ConversationFields, InputMessage
from shardwright.server.streaming import EventStream, event
from shardwright.server.usage import UsageCounter

TEMPLATE_ARGUMENTS = frozenset(
    ["messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"]
)
"""What a client may not set through chat_template_kwargs."""


def chat_router(context: ServerContext) -> APIRouter:
    """The route of this file."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions", openapi_extra=json_body(ChatBody))
    async def create_chat_completion(request: Request) -> Response:
        body = await read_body(request, ChatBody, max_bytes=context.config.max_body_bytes)
        context.check_model(body.model, task="generate")
        params, prompt = chat_params(body), conversation_prompt(context, body.messages, body)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        outputs = run_prompts(
            context, [prompt], params, request_id=request_id, priority=body.priority or 0, prompt_field="messages"
        )
        headers = {"X-Request-Id": request_id}
        head: dict[str, Any] = {"id": request_id, "created": int(time.time()), "model": context.model_name}
        if body.stream:
            writer = ChatEvents(ChatChunk(**head, choices=[]), params, UsageCounter(body.stream_options))
            return EventStream(outputs, writer, context.lifecycle, headers=headers)
        (output,) = await context.lifecycle.run(request.receive, gather(outputs, 1))
        usage = UsageCounter()
        usage.feed(0, output)
        response = ChatResponse(**head, choices=[choice(each, params) for each in output.outputs], usage=usage.usage())
        if body.prompt_logprobs is not None:
            response.prompt_logprobs = prompt_logprobs(output.prompt_logprobs or [])
        return Response(msgspec.json.encode(response), headers=headers, media_type="application/json")

    return router


def conversation_prompt(context: ServerContext, messages: Sequence[InputMessage], how: ConversationFields) -> list[int]:
    """Token ids of a conversation, by the chat template. Raises RequestError if it cannot be made."""
    if not messages:
        raise RequestError("messages is empty: give at least one message", param="messages")
    kwargs = how.chat_template_kwargs or {}
    if reserved := TEMPLATE_ARGUMENTS & kwargs.keys():
        raise RequestError(f"chat_template_kwargs may not set {min(reserved)}", param="chat_template_kwargs")
    continues = bool(how.continue_final_message)
    generates = not continues if how.add_generation_prompt is None else how.add_generation_prompt
    if continues and generates:
        raise RequestError(
            "continue_final_message contradicts add_generation_prompt: set one of them", param="continue_final_message"
        )
    return context.engine.tokenizer.apply_chat_template(
        [message.for_template() for message in messages],
        add_generation_prompt=generates,
        continue_final_message=continues,
        chat_template=context.chat_template,
        **kwargs,
    )


def chat_params(body: ChatBody) -> SamplingParams:
    """Sampling parameters of a body: as many tokens as fit unless it says otherwise. Raises RequestError."""
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) == 2:
        raise RequestError(
            f"max_tokens is {body.max_tokens}, max_completion_tokens is {body.max_completion_tokens}: give one of them",
            param="max_tokens",
        )
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs is {body.top_logprobs} but must be from 0 to {MAX_LOGPROBS}", param="top_logprobs"
        )
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_params(body, max_tokens=limits.pop() if limits else None, logprobs=num_logprobs)


def logprobs_of(completion: CompletionOutput, params: SamplingParams) -> ChatLogprobs | None:
    """Log-probabilities of a completion's tokens, whole or a delta; None if the request asked for none."""
    if params.logprobs is None or not completion.logprobs:
        return None
    return chat_logprobs(completion.token_ids, completion.logprobs, num_top=params.logprobs)


def choice(completion: CompletionOutput, params: SamplingParams) -> ChatChoice:
    """An entry of `choices`."""
    return ChatChoice(
        index=completion.index,
        message=ChatMessage(content=completion.text),
        logprobs=logprobs_of(completion, params),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
    )


class ChatEvents:
    """The events of a streamed answer: who speaks, then what is said, then why it ended."""

    def __init__(self, chunk: ChatChunk, params: SamplingParams, usage: UsageCounter) -> None:
        self._chunk = chunk
        self._params = params
        self._usage = usage
        self._begun: set[int] = set()

    def feed(self, index: int, output: RequestOutput) -> bytes:
        self._usage.feed(index, output)
        self._chunk.usage = self._usage.of_event()
        return b"".join(map(self._events, output.outputs))

    def _events(self, completion: CompletionOutput) -> bytes:
        events = b""
        if completion.index not in self._begun:
            self._begun.add(completion.index)
            events += self._event(ChatChunkChoice(index=completion.index, delta=ChatDelta("assistant", "")))
        logprobs = logprobs_of(completion, self._params)
        if completion.text or logprobs is not None or completion.finish_reason is not None:
            news = ChatChunkChoice(
                index=completion.index,
                delta=ChatDelta(content=completion.text) if completion.text else ChatDelta(),
                logprobs=logprobs,
                finish_reason=completion.finish_reason,
            )
            if completion.finish_reason is not None:
                news.stop_reason = completion.stop_reason
            events += self._event(news)
        return events

    def _event(self, news: ChatChunkChoice) -> bytes:
        self._chunk.choices = [news]
        return event(self._chunk)

    def end(self) -> bytes:
        if not self._usage.wants_final:
            return b""
        self._chunk.choices, self._chunk.usage = [], self._usage.usage()
        return event(self._chunk)

"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shardwright.errors import RequestError
from shardwright.server.chat import conversation_prompt
from shardwright.server.context import ServerContext
from shardwright.server.openapi import json_body
from shardwright.server.parsing import read_body
from shardwright.server.schemas import DetokenizeBody, TokenizeBody


class Tokens(msgspec.Struct, kw_only=True):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """Answer of `/detokenize`."""

    prompt: str


def tokenization_router(context: ServerContext) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["tokens"])
    engine, max_bytes = context.engine, context.config.max_body_bytes

    @router.post("/tokenize", openapi_extra=json_body(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody, max_bytes=max_bytes)
        context.check_model(body.model)
        tokens = tokens_of(context, body)
        answer = Tokens(count=len(tokens), max_model_len=engine.info.max_model_len, tokens=tokens)
        if body.return_token_strs:
            answer.token_strs = [engine.tokenizer.token_text(token) for token in tokens]
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @router.post("/detokenize", openapi_extra=json_body(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, max_bytes=max_bytes)
        context.check_model(body.model)
        size = engine.info.vocab_size
        if wrong := [token for token in body.tokens if not 0 <= token < size]:
            raise RequestError(f"tokens holds {wrong[0]}, but ids go from 0 to {size - 1}", param="tokens")
        text = engine.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return Response(msgspec.json.encode(Text(text)), media_type="application/json")

    return router


def tokens_of(context: ServerContext, body: TokenizeBody) -> list[int]:
    """Token ids of the body's prompt or messages. Raises RequestError unless it has just one of them."""
    if body.messages is not None and body.prompt is None:
        return conversation_prompt(context, body.messages, body)
    if body.prompt is None or body.messages is not None:
        raise RequestError("give either prompt or messages", param="prompt")
    return context.engine.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)

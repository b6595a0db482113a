"""`POST /v1/embeddings`, in OpenAI's shapes, and `POST /classify`, in vLLM's."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from shardwright.errors import RequestError
from shardwright.outputs import ClassificationOutput, EmbeddingOutput, ScoreOutput
from shardwright.server.completions import split_prompts
from shardwright.server.context import ServerContext
from shardwright.server.openapi import json_body
from shardwright.server.parsing import read_body
from shardwright.server.schemas import ClassifyBody, EmbeddingBody

PooledOutput = EmbeddingOutput | ClassificationOutput | ScoreOutput
Output = TypeVar("Output", bound=PooledOutput)

INPUT = {"prompt": "input"}
"""Where the body has one field for all texts."""


class PoolingUsage(msgspec.Struct):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    """One text's."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or their little-endian float32 in base64."""


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    """Embeddings in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class Classification(msgspec.Struct, kw_only=True):
    """What the model says of one text."""

    index: int
    label: str
    probs: list[float]
    logits: list[float]
    num_classes: int


class ClassificationResponse(msgspec.Struct, kw_only=True):
    """Classifications in the order of the texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: PoolingUsage


def pooling_router(context: ServerContext) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["pooling"])
    engine, max_bytes = context.engine, context.config.max_body_bytes

    @router.post("/v1/embeddings", openapi_extra=json_body(EmbeddingBody))
    async def create_embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingBody, max_bytes=max_bytes)
        context.check_model(body.model, task="embed")
        texts = split_prompts(body.input, field="input")

        async def embed() -> list[EmbeddingOutput]:
            return await engine.embed(
                texts, dimensions=body.dimensions, truncate_prompt_tokens=body.truncate_prompt_tokens
            )

        outputs = await context.lifecycle.run(request.receive, observed(context, embed))
        encode = in_base64 if body.encoding_format == "base64" else list
        data = [Embedding(index=i, embedding=encode(output.embedding)) for i, output in enumerate(outputs)]
        answer = EmbeddingResponse(data=data, model=context.model_name, usage=usage(outputs))
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @router.post("/classify", openapi_extra=json_body(ClassifyBody))
    async def classify(request: Request) -> Response:
        body = await read_body(request, ClassifyBody, max_bytes=max_bytes)
        context.check_model(body.model, task="classify")
        texts = split_prompts(body.input, field="input")

        async def classified() -> list[ClassificationOutput]:
            return await engine.classify(texts, truncate_prompt_tokens=body.truncate_prompt_tokens)

        outputs = await context.lifecycle.run(request.receive, observed(context, classified))
        answer = ClassificationResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=context.model_name,
            data=[
                Classification(index=i, label=one.label, probs=one.probs, logits=one.logits, num_classes=len(one.probs))
                for i, one in enumerate(outputs)
            ],
            usage=usage(outputs),
        )
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router


async def observed(
    context: ServerContext, work: Callable[[], Awaitable[list[Output]]], *, fields: Mapping[str, str] = INPUT
) -> list[Output]:
    """Do a request's work, admitted as one and seen by the metrics.

    Args:
        context: of the server.
        work: asks the engine.
        fields: of the request, by the names that the engine has for them; errors name them.
    """
    with context.lifecycle.admit(1), context.metrics.observe_request() as observation:
        try:
            outputs = await work()
        except RequestError as exc:
            name, bracket, place = (exc.param or "").partition("[")
            if name in fields:
                exc.param = fields[name] + bracket + place
            raise
        observation.end_of_reading(usage(outputs).prompt_tokens)
    return outputs


def usage(outputs: Sequence[PooledOutput]) -> PoolingUsage:
    """Token counts of all texts."""
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return PoolingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)


def in_base64(embedding: list[float]) -> str:
    """An embedding as OpenAI's clients read it fastest."""
    return base64.b64encode(np.asarray(embedding, dtype="<f4").tobytes()).decode("ascii")

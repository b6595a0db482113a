"""`POST /score`, in vLLM's shape, and `POST /rerank`, in Jina's."""

from __future__ import annotations

import time
import uuid
from typing import Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shardwright.errors import RequestError
from shardwright.outputs import ScoreOutput
from shardwright.server.completions import split_prompts
from shardwright.server.context import ServerContext
from shardwright.server.openapi import json_body
from shardwright.server.parsing import read_body
from shardwright.server.pooling import PoolingUsage, observed, usage
from shardwright.server.schemas import RerankBody, ScoreBody

RERANK_FIELDS = {"text_1": "query", "text_2": "documents"}
"""What a reranking request calls the texts of pairs."""


class Score(msgspec.Struct, kw_only=True):
    """Of one text, or one pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(msgspec.Struct, kw_only=True):
    """Scores in the order of the texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class RankedText(msgspec.Struct):
    """What a document says."""

    text: str


class Ranked(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One document."""

    index: int
    """In the request."""
    relevance_score: float
    document: RankedText | None = None


class RerankResponse(msgspec.Struct, kw_only=True):
    """Documents, the most relevant one first."""

    id: str
    model: str
    usage: PoolingUsage
    results: list[Ranked]


def scores_router(context: ServerContext) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["pooling"])
    engine, max_bytes = context.engine, context.config.max_body_bytes

    @router.post("/score", openapi_extra=json_body(ScoreBody))
    @router.post("/v1/score", openapi_extra=json_body(ScoreBody))
    async def score(request: Request) -> Response:
        body = await read_body(request, ScoreBody, max_bytes=max_bytes)
        context.check_model(body.model, task="score")
        text_1 = split_prompts(body.text_1, field="text_1")
        text_2 = None if body.text_2 is None else split_prompts(body.text_2, field="text_2")

        async def scored() -> list[ScoreOutput]:
            return await engine.score(text_1, text_2, truncate_prompt_tokens=body.truncate_prompt_tokens)

        outputs = await context.lifecycle.run(request.receive, observed(context, scored, fields={}))
        answer = ScoreResponse(
            id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=context.model_name,
            data=[Score(index=i, score=output.score) for i, output in enumerate(outputs)],
            usage=usage(outputs),
        )
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @router.post("/rerank", openapi_extra=json_body(RerankBody))
    @router.post("/v1/rerank", openapi_extra=json_body(RerankBody))
    @router.post("/v2/rerank", openapi_extra=json_body(RerankBody))
    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankBody, max_bytes=max_bytes)
        context.check_model(body.model, task="score")
        documents = [one if isinstance(one, str) else one.text for one in body.documents]
        if not documents:
            raise RequestError("documents is an empty list: give at least one", param="documents")
        if body.top_n is not None and body.top_n < 0:
            raise RequestError(f"top_n is {body.top_n} but must be at least 1, or 0 for all", param="top_n")

        async def scored() -> list[ScoreOutput]:
            return await engine.score([body.query], [*documents], truncate_prompt_tokens=body.truncate_prompt_tokens)

        outputs = await context.lifecycle.run(request.receive, observed(context, scored, fields=RERANK_FIELDS))
        order = sorted(range(len(documents)), key=lambda i: -outputs[i].score)[: body.top_n or None]
        results = [
            Ranked(
                index=i,
                relevance_score=outputs[i].score,
                document=None if body.return_documents is False else RankedText(documents[i]),
            )
            for i in order
        ]
        answer = RerankResponse(
            id=f"rerank-{uuid.uuid4().hex}", model=context.model_name, usage=usage(outputs), results=results
        )
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router

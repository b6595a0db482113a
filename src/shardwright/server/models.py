"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from shardwright.server.context import ServerContext


class ModelCard(msgspec.Struct, kw_only=True):
    """What the API says of a model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "shardwright"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct):
    """All models of the server: one."""

    data: list[ModelCard]
    object: str = "list"


def models_router(context: ServerContext) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["models"])

    def card() -> ModelCard:
        info = context.engine.info
        return ModelCard(
            id=context.model_name, created=int(context.started_at), root=info.model, max_model_len=info.max_model_len
        )

    @router.get("/v1/models")
    async def list_models() -> Response:
        return Response(msgspec.json.encode(ModelList([card()])), media_type="application/json")

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        # A path loses its leading slash to clients that join URLs.
        context.check_model(context.model_name if f"/{model_id}" == context.model_name else model_id)
        return Response(msgspec.json.encode(card()), media_type="application/json")

    return router

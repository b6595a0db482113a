"""The OpenAPI document: handlers parse their bodies themselves, so FastAPI has to be told what these look like."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shardwright.server.errors import ErrorBody
from shardwright.server.schemas import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    ScoreBody,
    TokenizeBody,
)

BODIES: tuple[type[BaseModel], ...] = (
    CompletionBody,
    ChatBody,
    EmbeddingBody,
    ClassifyBody,
    ScoreBody,
    RerankBody,
    TokenizeBody,
    DetokenizeBody,
)
REF = "#/components/schemas/{}"


def json_content(schema: str) -> dict[str, Any]:
    """The content of a JSON body that a schema of the document describes."""
    return {"application/json": {"schema": {"$ref": REF.format(schema)}}}


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra` that says which body it reads."""
    return {"requestBody": {"required": True, "content": json_content(schema.__name__)}}


def document_bodies(app: FastAPI) -> None:
    """Put the schemas of bodies and errors into the app's document, which is made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(
                get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The document with our bodies, and our errors in place of FastAPI's."""
    _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=REF.format("{model}"))
    _, errors = msgspec.json.schema_components([ErrorBody], ref_template=REF.format("{name}"))
    document["components"] = {"schemas": bodies["$defs"] | errors}
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = {"description": "What went wrong.", "content": json_content("ErrorBody")}
    return document

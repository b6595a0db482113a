"""What the server says about itself: `/health`, `/version`, `/metrics`, `/status`, and `/`, the page for people."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from time import time

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from shardwright.errors import EngineBusyError
from shardwright.server.context import ServerContext
from shardwright.server.errors import APIError
from shardwright.server.lifecycle import State

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


class Status(msgspec.Struct, kw_only=True):
    """The state of the server, for the page and for scripts."""

    state: str
    """ready, draining, stopped, or dead when the engine is."""
    version: str
    model: str
    architecture: str
    dtype: str
    device: str
    num_parameters: int
    weight_bytes: int
    vocab_size: int
    max_model_len: int
    task: str
    """generate, embed or classify."""
    has_chat: bool
    needs_key: bool
    kv_cache_usage: float
    kv_cache_bytes: int
    num_running: int
    num_waiting: int
    num_generated_tokens: int
    uptime_s: float


def status_router(context: ServerContext) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> Response:
        if not context.engine.is_alive:
            raise APIError("the engine is dead: restart the server", status=503, code="engine_dead")
        if context.lifecycle.state is not State.READY:
            raise EngineBusyError("the server is shutting down")
        return Response(b'{"status":"ok"}', media_type="application/json")

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": context.version}

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = context.metrics.expose(request.headers.get("accept"))
        return Response(body, headers={"Content-Type": content_type})

    @router.get("/status")
    async def status() -> Response:
        return Response(msgspec.json.encode(current_status(context)), media_type="application/json")

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(page_html(), headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    return router


def current_status(context: ServerContext) -> Status:
    """The server's state as of the engine's latest step."""
    info, stats = context.engine.info, context.engine.stats
    return Status(
        state=context.lifecycle.state if context.engine.is_alive else "dead",
        version=context.version,
        model=context.model_name,
        architecture=info.architecture,
        dtype=info.dtype,
        device=info.device,
        num_parameters=info.num_parameters,
        weight_bytes=info.weight_bytes,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        task=info.task,
        has_chat=context.has_chat,
        needs_key=context.config.required_key is not None,
        kv_cache_usage=stats.kv_cache_usage,
        kv_cache_bytes=info.kv_cache_bytes,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_generated_tokens=stats.num_generated_tokens,
        uptime_s=time() - context.started_at,
    )


@cache
def page_html() -> str:
    """The page, a file of the package."""
    return files("shardwright.server").joinpath("page.html").read_text(encoding="utf-8")

"""The ASGI application: routes, middleware and error handlers around one engine."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from shardwright.server.auth import RequireKey
from shardwright.server.chat import chat_router
from shardwright.server.completions import completions_router
from shardwright.server.config import ServerConfig
from shardwright.server.context import ServerContext
from shardwright.server.engine import ServedEngine
from shardwright.server.errors import add_error_handlers
from shardwright.server.lifecycle import Lifecycle
from shardwright.server.metrics import Metrics
from shardwright.server.models import models_router
from shardwright.server.openapi import document_bodies
from shardwright.server.pooling import pooling_router
from shardwright.server.scores import scores_router
from shardwright.server.status import status_router
from shardwright.server.tokenization import tokenization_router


def build_app(engine: ServedEngine, config: ServerConfig, *, lifecycle: Lifecycle | None = None) -> FastAPI:
    """The application that serves an engine.

    Args:
        engine: owned by the caller, who closes it.
        config: of the server; its address, TLS and log level are not the app's business.
        lifecycle: decides whether requests are taken; a fresh one unless the caller wants to drain and stop.

    Raises: ConfigError if the chat template cannot be read.
    """
    release = version("shardwright")
    context = ServerContext(
        engine=engine,
        config=config,
        lifecycle=lifecycle
        or Lifecycle(max_requests=config.max_queued_requests, drain_timeout_s=config.drain_timeout_s),
        metrics=Metrics(engine, version=release),
        model_name=config.served_model_name or engine.info.model,
        chat_template=config.read_chat_template(),
        version=release,
    )
    app = FastAPI(title="shardwright", version=release, description="An OpenAI-compatible server.", redoc_url=None)
    for make_router in (
        completions_router,
        chat_router,
        pooling_router,
        scores_router,
        models_router,
        tokenization_router,
        status_router,
    ):
        app.include_router(make_router(context))
    document_bodies(app)
    add_error_handlers(app)
    if (key := config.required_key) is not None:
        app.add_middleware(RequireKey, key=key)
    if origins := config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app

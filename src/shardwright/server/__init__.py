"""The OpenAI-compatible HTTP server: one room of request handlers in front of one engine.

A request's way: `parsing` turns the body into a record of `schemas`, `completions` or `chat` turn that into sampling
parameters and prompts, `generation` runs them on the engine, `streaming` or a plain response carries what comes back,
and every error on the way becomes OpenAI's error body in `errors`. `lifecycle` decides whether requests are taken,
`launch` owns process and socket.

`ServerConfig` is light to import, for the sake of command-line help; the rest loads FastAPI on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.server.config import ServerConfig

if TYPE_CHECKING:
    from shardwright.server.app import build_app
    from shardwright.server.launch import serve

__all__ = ["ServerConfig", "build_app", "serve"]


def __getattr__(name: str) -> Any:
    if name == "build_app":
        from shardwright.server.app import build_app

        return build_app
    if name == "serve":
        from shardwright.server.launch import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

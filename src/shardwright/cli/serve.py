"""`shardwright serve`: the OpenAI-compatible server."""

from __future__ import annotations

import logging
from typing import Any

import typer

from shardwright.cli.help import Command, examples
from shardwright.cli.options import Model, engine_flags, record_flags, with_flags
from shardwright.cli.output import show_logs
from shardwright.config import EngineConfig
from shardwright.server import ServerConfig

EXAMPLES = examples(
    "shardwright serve smollm2-135m",
    "shardwright serve ./my-model --port 8001 --max-model-len 4096 --kv-cache-memory-bytes 2GiB",
    "shardwright serve ./my-model --host 0.0.0.0 --api-key secret --served-model-name my-model",
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("serve", cls=Command, epilog=EXAMPLES)(serve)


@with_flags(server=record_flags(ServerConfig), engine=engine_flags())
def serve(model: Model, *, server: dict[str, Any], engine: dict[str, Any]) -> None:
    """Serve a model over HTTP, with OpenAI's API. Ctrl-C or SIGTERM finishes running requests, then stops."""
    engine_config = EngineConfig.from_options(model, **engine)
    server_config = ServerConfig(**server)
    if logging.getLogger("shardwright").level > logging.INFO:
        show_logs(logging.INFO)
    from shardwright.server import serve as run_server

    if code := run_server(engine_config, server_config):
        raise typer.Exit(code)

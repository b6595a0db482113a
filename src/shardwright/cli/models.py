"""`shardwright models`: what a server has."""

from __future__ import annotations

import typer

from shardwright.cli.client import DEFAULT_URL, ApiKey, Url, connect, server_errors
from shardwright.cli.help import Command, examples
from shardwright.cli.options import Json
from shardwright.cli.output import print_json, print_text

EXAMPLES = examples(
    "shardwright models",
    "shardwright models --url http://localhost:8001/v1 --json",
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("models", cls=Command, epilog=EXAMPLES)(models)


def models(url: Url = DEFAULT_URL, api_key: ApiKey = None, json: Json = False) -> None:
    """List the models of an OpenAI-compatible server."""
    client = connect(url, api_key)
    with server_errors(url):
        listed = client.models.list().data
    if json:
        print_json({"url": url, "models": [model.model_dump() for model in listed]})
        return
    for model in listed:
        length = getattr(model, "max_model_len", None)
        print_text(f"{model.id}  (max_model_len {length})" if length else model.id)

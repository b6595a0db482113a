"""What `complete`, `chat` and `models` share: a connection to a server, and its errors in our words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.errors import EngineBusyError, EngineError, RequestError

if TYPE_CHECKING:
    import openai

Url = Annotated[str, typer.Option("--url", help="Base address of the server's API.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Model to ask; default: the first that the server lists.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", help="Key of the server; default: SHARDWRIGHT_API_KEY or OPENAI_API_KEY of the environment."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to generate; default: the server's.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: the server's.")]

DEFAULT_URL = "http://localhost:8000/v1"


def connect(url: str, api_key: str | None) -> openai.OpenAI:
    """A client of the server. Nothing is sent yet."""
    import openai

    key = api_key or os.environ.get("SHARDWRIGHT_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"--url is {url!r} but must begin with http:// or https://, e.g. {DEFAULT_URL}")
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """Turn the client's exceptions into ours: bad input is ours to mend, the rest is the server's."""
    import openai

    try:
        yield
    except openai.APITimeoutError as exc:
        raise EngineError(f"the server at {url} did not answer in time") from exc
    except openai.APIConnectionError as exc:
        raise EngineError(
            f"no server answers at {url}: start one with `shardwright serve smollm2-135m`, or name another with --url"
        ) from exc
    except openai.AuthenticationError as exc:
        raise RequestError(f"the server at {url} refuses the key: give the right one with --api-key") from exc
    except openai.APIStatusError as exc:
        text = f"the server at {url} says {exc.status_code}: {said(exc)}"
        if exc.status_code in (429, 503):
            raise EngineBusyError(text) from exc
        raise (RequestError if exc.status_code < 500 else EngineError)(text) from exc
    except openai.APIError as exc:
        raise EngineError(f"the server at {url} failed: {exc.message}") from exc


def said(error: openai.APIStatusError) -> str:
    """The server's own message: of OpenAI's error body, or what came instead."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(body or error.message)[:500]


def choose_model(client: openai.OpenAI, wanted: str | None) -> str:
    """The model asked for, or the first that the server lists. Raises EngineError if it lists none."""
    if wanted is not None:
        return wanted
    listed = client.models.list().data
    if not listed:
        raise EngineError(f"the server at {client.base_url} lists no model: name one with --model")
    return listed[0].id

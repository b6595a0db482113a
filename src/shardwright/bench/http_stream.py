"""A small HTTP client for streams of server-sent events: one connection a request, nothing between socket and caller.

Client libraries spend a fraction of a millisecond on every event, on cores that the server needs; uvicorn's own parser
needs a hundredth of that. Not covered: redirects, proxies, connections that are used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httptools
import msgspec

from shardwright.errors import EngineError, UsageError

READ_BYTES = 1 << 16
STALL_TIMEOUT_S = 600.0
"""A server that says nothing for so long is taken to be stuck."""


class StreamError(EngineError):
    """A request that was not answered as it should have been; the message says why."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, and the key that it wants, if any."""

    url: str
    """Without `/v1`: `http://127.0.0.1:8000`."""
    api_key: str | None = None

    def parts(self) -> SplitResult:
        """The address taken apart. Raises UsageError if it is none."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"the address is {self.url!r} but must be like http://127.0.0.1:8000")
        return parts


class Reply:
    """What the parser has seen of a response: the callbacks are those of httptools."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_complete = False
        self.parser = httptools.HttpResponseParser(self)

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_complete = True


def request_bytes(server: Server, method: str, path: str, document: object = None) -> bytes:
    """One HTTP request, whole."""
    parts = server.parts()
    body = b"" if document is None else msgspec.json.encode(document)
    lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
    lines += ["Connection: close", "Accept: */*", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/json"] if body else []
    lines += [f"Authorization: Bearer {server.api_key}"] if server.api_key else []
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def connection(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed in the end. Raises StreamError if nobody answers."""
    parts = server.parts()
    context = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if context else 80)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
    except OSError as exc:
        raise StreamError(f"no server answers at {server.url}: {exc.strerror or exc}") from exc
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def exchange(server: Server, method: str, path: str, document: object = None) -> AsyncGenerator[Reply]:
    """Send a request, and yield its reply whenever there is more of it.

    Raises: StreamError if the connection fails or stalls, or ends before the reply does, or if its status is an error.
    """
    async with connection(server) as (reader, writer):
        reply = Reply()
        try:
            writer.write(request_bytes(server, method, path, document))
            while not reply.is_complete:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    data = await reader.read(READ_BYTES)
                if not data:
                    raise StreamError("the connection was closed before the answer was complete")
                reply.parser.feed_data(data)
                if reply.is_complete or reply.parser.get_status_code() < 400:
                    check_status(reply)
                    yield reply
        except TimeoutError as exc:
            raise StreamError(f"the server said nothing for {STALL_TIMEOUT_S:g} s") from exc
        except (OSError, httptools.HttpParserError) as exc:
            raise StreamError(f"the connection failed: {exc}") from exc


def check_status(reply: Reply) -> None:
    """Raises StreamError for a status that is an error, with the server's message."""
    if (status := reply.parser.get_status_code()) >= 400:
        raise StreamError(f"status {status}: {error_message(bytes(reply.body))}")


def error_message(body: bytes) -> str:
    """The message of an error body of OpenAI's shape, or the beginning of what came instead."""
    with contextlib.suppress(msgspec.DecodeError):
        document = msgspec.json.decode(body)
        error = document.get("error", document) if isinstance(document, dict) else document
        message = error.get("message") if isinstance(error, dict) else error
        if message:
            return str(message)[:500]
    return body.decode(errors="replace")[:500]


async def get_json(server: Server, path: str) -> object:
    """The document at a path. Raises StreamError."""
    body = b""
    async for reply in exchange(server, "GET", path):
        body = bytes(reply.body)
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError as exc:
        raise StreamError(f"{server.url}{path} is no JSON document") from exc


async def post_events(server: Server, path: str, document: object) -> AsyncGenerator[bytes]:
    """Post a document and yield the data of each server-sent event as it comes. Raises StreamError."""
    async with contextlib.aclosing(exchange(server, "POST", path, document)) as replies:
        async for reply in replies:
            *lines, rest = bytes(reply.body).split(b"\n")
            reply.body[:] = rest
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[len(b"data:") :].strip()

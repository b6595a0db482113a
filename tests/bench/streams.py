"""A server of OpenAI's API that answers token by token, as tests tell it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from shardwright.bench.http_stream import Server


@dataclass
class Script:
    """How a server behaves."""

    delay_s: float = 0.0
    """Before each token."""
    status: int = 200
    tokens_per_event: int = 1
    cut_after: int | None = None
    """Tokens after which the connection is closed."""
    error_after: int | None = None
    """Tokens after which an event says that the engine failed."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)


def chunk(text: str) -> bytes:
    data = text.encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@contextlib.asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Server]:
    """The server while it runs."""
    answering: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.current_task())
        try:
            await reply(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        script.heads.append(head)
        length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
        content = await reader.readexactly(length)
        if not content:
            document = json.dumps({"data": [{"id": "scripted", "max_model_len": 64}]})
            status = 200 if " /v1/models " in head else 404
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(document)}\r\n\r\n{document}".encode())
        else:
            await generate(json.loads(content), writer)

    async def generate(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        script.bodies.append(body)
        if script.status != 200:
            document = json.dumps({"error": {"message": "not today"}})
            writer.write(f"HTTP/1.1 {script.status} X\r\nContent-Length: {len(document)}\r\n\r\n{document}".encode())
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for first in range(0, body["max_tokens"], script.tokens_per_event):
            if script.cut_after is not None and first >= script.cut_after:
                return
            if script.error_after is not None and first >= script.error_after:
                writer.write(chunk('data: {"error": {"message": "the engine died"}}\n\n') + chunk(""))
                return
            await asyncio.sleep(script.delay_s)
            tokens = list(range(first, min(first + script.tokens_per_event, body["max_tokens"])))
            event = json.dumps({"choices": [{"index": 0, "text": "", "token_ids": tokens}], "model": "scripted"})
            writer.write(chunk(f"data: {event[:20]}") + chunk(f"{event[20:]}\n\n"))  # an event may come in pieces
            await writer.drain()
        writer.write(chunk("data: [DONE]\n\n") + chunk(""))

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "secret")
        await asyncio.gather(*filter(None, answering), return_exceptions=True)  # a client may have gone away

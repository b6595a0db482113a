"""A client that speaks ASGI by hand: it reads a stream piece by piece and can go away, as httpx's transport cannot."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


class Connection:
    """One POST request to an app, in flight."""

    def __init__(self, app: ASGIApp, path: str, body: dict[str, Any]) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "server": ("server", 80),
            "client": ("client", 1),
        }
        self._task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message.get("body"):
            self._pieces.put_nowait(message["body"])

    async def piece(self) -> bytes:
        """The next piece of the body."""
        return await asyncio.wait_for(self._pieces.get(), 5)

    async def end(self) -> bytes:
        """Wait for the end of the response; the pieces not read so far."""
        await asyncio.wait_for(self._task, 5)
        return b"".join(self._pieces.get_nowait() for _ in range(self._pieces.qsize()))

    def cut_short(self) -> None:
        """Go away with half of the body sent; to be called before the app has run."""
        self._incoming.get_nowait()
        self._incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def disconnect(self) -> None:
        """Go away."""
        self._incoming.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self._task, 5)


def events(body: bytes | str) -> list[Any]:
    """The data of server-sent events: parsed, the final [DONE] as it is."""
    text = body.decode() if isinstance(body, bytes) else body
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]

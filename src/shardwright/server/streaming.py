"""Server-sent events: outputs in, `data:` lines out, as steps bring them."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shardwright.errors import ShardwrightError
from shardwright.outputs import RequestOutput
from shardwright.server.errors import error_json, to_api_error
from shardwright.server.generation import Outputs
from shardwright.server.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def event(record: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(record) + b"\n\n"


class EventWriter(Protocol):
    """Makes the events of one API's stream."""

    def feed(self, index: int, output: RequestOutput) -> bytes:
        """Events for a delta of prompt `index`; empty if it brings nothing to show."""
        ...

    def end(self) -> bytes:
        """Events after the last output."""
        ...


class EventStream(Response):
    """A response that runs the generation it streams.

    Nothing is sent before the first output: a request that the engine refuses gets an ordinary error response. An error
    after that becomes an event, and the stream ends. When the client goes away, the outputs are closed.
    """

    media_type = "text/event-stream"

    def __init__(self, outputs: Outputs, writer: EventWriter, lifecycle: Lifecycle, *, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # of the empty body that Response assumes
        self._outputs = outputs
        self._writer = writer
        self._lifecycle = lifecycle
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._lifecycle.run(receive, self._send_outputs(send))
        except Exception as exc:
            if not self._started:
                raise
            if isinstance(exc, ClientDisconnect):
                return
            await self._send(send, b"data: " + error_json(exc) + b"\n\n")
            await self._send(send, b"", more=False)
            if to_api_error(exc).status == 500:
                logger.error("a stream ended early: %s", exc, exc_info=not isinstance(exc, ShardwrightError))

    async def _send_outputs(self, send: Send) -> None:
        async with aclosing(self._outputs) as outputs:
            async for index, output in outputs:
                if events := self._writer.feed(index, output):
                    await self._send(send, events)
        await self._send(send, self._writer.end() + DONE, more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})

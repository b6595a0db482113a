"""Whether the server takes requests, how many it has, and how those end that are in its way when it stops.

ready ──start_draining()──► draining ──stop()──► stopped
takes requests              refuses new ones,     unfinished requests are
                            finishes the others   answered with an error
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from enum import StrEnum
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from shardwright.errors import EngineBusyError, RequestError

T = TypeVar("T")


class State(StrEnum):
    """In this order, once."""

    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """The server's state and its unfinished requests.

    Args:
        max_requests: most completions in flight; more are refused.
        drain_timeout_s: how long running requests may go on once draining began.
    """

    def __init__(self, *, max_requests: int, drain_timeout_s: float) -> None:
        self.max_requests = max_requests
        self.drain_timeout_s = drain_timeout_s
        self.state = State.READY
        self.num_in_flight = 0
        self._drain_until = float("inf")
        self._interruptions: set[asyncio.Future[None]] = set()

    @contextlib.contextmanager
    def admit(self, num_completions: int) -> Iterator[None]:
        """Count completions as in flight for as long as the block runs.

        Raises: EngineBusyError when draining or full; RequestError if so many can never be admitted.
        """
        if self.state is not State.READY:
            raise EngineBusyError("the server is shutting down and takes no more requests: try again in a moment")
        if num_completions > self.max_requests:
            raise RequestError(
                f"the request asks for {num_completions} completions (prompts times n) but this server takes at most "
                f"{self.max_requests} at once: split it, or start with --max-queued-requests {num_completions}"
            )
        if self.num_in_flight + num_completions > self.max_requests:
            raise EngineBusyError(
                f"the server is full, with {self.num_in_flight} of {self.max_requests} completions in flight: "
                "try again in a moment"
            )
        self.num_in_flight += num_completions
        try:
            yield
        finally:
            self.num_in_flight -= num_completions

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self.state = State.DRAINING
        self._drain_until = time.monotonic() + self.drain_timeout_s

    @property
    def is_drained(self) -> bool:
        """True once nothing is in flight, or time is up."""
        return self.state is not State.READY and (self.num_in_flight == 0 or time.monotonic() >= self._drain_until)

    def stop(self) -> None:
        """End what is unfinished: each request gets an error as its answer."""
        self.state = State.STOPPED
        for interruption in self._interruptions:
            if not interruption.done():
                interruption.set_exception(EngineBusyError("the server shut down before this request was finished"))

    async def run(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """Do a request's work for as long as its client is there and the server runs; cancel it otherwise.

        Args:
            receive: of the request, whose body has been read.
            work: what to do.

        Raises: ClientDisconnect or EngineBusyError when interrupted, and whatever `work` raises.
        """
        task = asyncio.ensure_future(work)
        interruption: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watcher = asyncio.ensure_future(watch_client(receive, interruption))
        self._interruptions.add(interruption)
        try:
            await asyncio.wait((task, interruption), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                interruption.result()
            return task.result()
        finally:
            self._interruptions.discard(interruption)
            interruption.cancel()
            for other in (task, watcher):
                other.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)


async def watch_client(receive: Receive, interruption: asyncio.Future[None]) -> None:
    """Interrupt once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not interruption.done():
        interruption.set_exception(ClientDisconnect())

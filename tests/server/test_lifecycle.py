from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from tests.server.asgi import Connection, events
from tests.server.fake_engine import AlphabetEngine

from shardwright.errors import EngineBusyError, RequestError
from shardwright.server import ServerConfig, build_app
from shardwright.server.generation import merge
from shardwright.server.lifecycle import Lifecycle

pytestmark = pytest.mark.asyncio


def make_lifecycle(max_requests: int = 4, drain_timeout_s: float = 60) -> Lifecycle:
    return Lifecycle(max_requests=max_requests, drain_timeout_s=drain_timeout_s)


async def test_admission_counts_until_the_block_ends() -> None:
    lifecycle = make_lifecycle(max_requests=4)
    with lifecycle.admit(3):
        with pytest.raises(EngineBusyError, match="3 of 4"), lifecycle.admit(2):
            pass
        with lifecycle.admit(1):
            assert lifecycle.num_in_flight == 4
    assert lifecycle.num_in_flight == 0


async def test_request_that_can_never_fit_is_not_told_to_try_again() -> None:
    with pytest.raises(RequestError, match="at most 4 at once"), make_lifecycle(max_requests=4).admit(5):
        pass


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    lifecycle = make_lifecycle()
    with lifecycle.admit(1):
        lifecycle.start_draining()
        assert not lifecycle.is_drained
        with pytest.raises(EngineBusyError, match="shutting down"), lifecycle.admit(1):
            pass
    assert lifecycle.is_drained


async def test_draining_ends_when_time_is_up() -> None:
    lifecycle = make_lifecycle(drain_timeout_s=0)
    with lifecycle.admit(1):
        lifecycle.start_draining()
        assert lifecycle.is_drained


async def test_full_server_answers_503_with_retry_after(engine: AlphabetEngine) -> None:
    app = build_app(engine, ServerConfig(max_queued_requests=2))
    engine.steps = asyncio.Semaphore(0)
    first = Connection(app, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1})
    while len(engine.running) < 2:
        await asyncio.sleep(0)
    for stream in (False, True):
        refused = Connection(app, "/v1/completions", {"prompt": "c", "stream": stream})
        body = await refused.end()
        assert refused.status == 503
        assert refused.headers["retry-after"]
        assert b"2 of 2" in body
    for _ in range(2):
        engine.steps.release()
    await first.end()
    assert first.status == 200
    engine.steps = None
    again = Connection(app, "/v1/completions", {"prompt": "c"})
    await again.end()
    assert again.status == 200


async def test_stop_answers_unfinished_requests_with_an_error(engine: AlphabetEngine) -> None:
    lifecycle = make_lifecycle()
    app = build_app(engine, ServerConfig(), lifecycle=lifecycle)
    engine.steps = asyncio.Semaphore(2)
    streamed = Connection(app, "/v1/completions", {"prompt": "a", "stream": True})
    for _ in range(2):
        await streamed.piece()
    whole = Connection(app, "/v1/completions", {"prompt": "a"})
    while len(engine.running) < 2:
        await asyncio.sleep(0)
    lifecycle.start_draining()
    lifecycle.stop()
    (error,) = events(await streamed.end())
    assert "shut down before this request was finished" in error["error"]["message"]
    await whole.end()
    assert whole.status == 503
    assert len(engine.aborted) == 2
    assert lifecycle.num_in_flight == 0


async def test_closing_a_merged_stream_closes_its_parts() -> None:
    closed = []

    async def part(index: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                await asyncio.sleep(0)
                yield index
        finally:
            closed.append(index)

    merged = merge([part(0), part(1), part(2)])
    seen = {(await anext(merged))[0] for _ in range(9)}
    await merged.aclose()
    assert seen == {0, 1, 2}
    assert sorted(closed) == [0, 1, 2]

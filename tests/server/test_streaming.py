from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.server.asgi import Connection, events
from tests.server.fake_engine import AlphabetEngine

from shardwright.server import ServerConfig, build_app

pytestmark = pytest.mark.asyncio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT: dict[str, Any] = {"prompt": "a", "max_tokens": 50}
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 20}


def connect(engine: AlphabetEngine, path: str, **body: Any) -> Connection:
    return Connection(build_app(engine, ServerConfig()), path, body)


async def until_running(engine: AlphabetEngine, count: int = 1) -> None:
    while len(engine.running) < count:
        await asyncio.sleep(0)


async def test_tokens_are_sent_as_steps_bring_them(engine: AlphabetEngine) -> None:
    engine.steps = asyncio.Semaphore(0)
    connection = connect(engine, COMPLETIONS, **PROMPT, stream=True)
    for letter in "bcd":
        engine.steps.release()
        (chunk,) = events(await connection.piece())
        assert chunk["choices"][0]["text"] == letter
    await connection.disconnect()


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, MESSAGES)])
@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_goes_away_aborts_its_request(
    engine: AlphabetEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.steps = asyncio.Semaphore(0)
    connection = connect(engine, path, **body, stream=stream)
    await until_running(engine)
    engine.steps.release()
    if stream:
        await connection.piece()
    await connection.disconnect()
    assert not engine.running
    assert len(engine.aborted) == 1


async def test_client_that_goes_away_before_the_first_token_aborts_its_request(engine: AlphabetEngine) -> None:
    engine.steps = asyncio.Semaphore(0)
    connection = connect(engine, COMPLETIONS, **PROMPT, stream=True)
    await until_running(engine)
    await connection.disconnect()
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_goes_away_aborts_all_its_prompts(engine: AlphabetEngine, stream: bool) -> None:
    engine.steps = asyncio.Semaphore(0)
    connection = connect(engine, COMPLETIONS, prompt=["a", "b", "c"], stream=stream)
    await until_running(engine, 3)
    await connection.disconnect()
    assert not engine.running
    assert len(engine.aborted) == 3


async def test_client_that_goes_away_amid_its_body_is_no_failure(engine: AlphabetEngine) -> None:
    connection = connect(engine, COMPLETIONS)
    connection.cut_short()
    await connection.end()
    assert connection.status == 499
    assert not engine.requests


async def test_finished_request_is_not_aborted(engine: AlphabetEngine) -> None:
    connection = connect(engine, COMPLETIONS, **PROMPT, stream=True)
    await connection.end()
    assert not engine.aborted
    assert not engine.running


async def test_error_before_the_first_token_has_its_status(engine: AlphabetEngine) -> None:
    engine.dies_after = 0
    connection = connect(engine, COMPLETIONS, **PROMPT, stream=True)
    body = await connection.end()
    assert connection.status == 500
    assert b'"code":"engine_dead"' in body


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, MESSAGES)])
async def test_error_after_the_stream_began_is_an_event(
    engine: AlphabetEngine, path: str, body: dict[str, Any]
) -> None:
    engine.dies_after = 2
    connection = connect(engine, path, **body, stream=True)
    *chunks, last = events(await connection.end())
    assert connection.status == 200
    assert len(chunks) >= 2
    assert last == {
        "error": {
            "message": "the engine process is gone",
            "type": "server_error",
            "param": None,
            "code": "engine_dead",
        }
    }


async def test_engine_that_dies_fails_a_request_that_waits_for_it(engine: AlphabetEngine) -> None:
    engine.dies_after = 2
    connection = connect(engine, COMPLETIONS, **PROMPT)
    await connection.end()
    assert connection.status == 500


async def test_unforeseen_error_is_a_500_that_keeps_its_text_to_the_log(
    engine: AlphabetEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: 1 / 0)
    connection = connect(engine, COMPLETIONS, **PROMPT)
    with pytest.raises(ZeroDivisionError):  # for the log of whoever runs the app
        await connection.end()
    assert connection.status == 500
    body = await connection.piece()
    assert b"server_error" in body
    assert b"division" not in body

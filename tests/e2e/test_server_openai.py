"""The real server process with a tiny model, asked by the real `openai` client."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI
from tests.server.process import ServerProcess, free_port

pytestmark = pytest.mark.slow  # every server process takes seconds to start

MODEL = "tiny"
PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
LONG = 230
"""Tokens of a request that goes on while a test does something else."""


def start_server(model: Path, *options: str) -> ServerProcess:
    port = free_port()
    command = ["-m", "shardwright", "serve", str(model), "--port", str(port), "--served-model-name", MODEL]
    server = ServerProcess(*command, "--kv-cache-memory-bytes", "4MiB", *options, port=port)
    try:
        server.wait_until_ready()
    except BaseException:
        server.kill()
        raise
    return server


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    """One server for the tests that leave it as they found it."""
    server = start_server(tiny_llama)
    yield server
    server.process.terminate()
    code, _, err = server.end()
    assert code == 0, err
    assert "Traceback" not in err


@pytest.fixture
def own_server(tiny_llama: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers for tests that end theirs; takes command-line options."""
    started = []

    def start(*options: str) -> ServerProcess:
        started.append(start_server(tiny_llama, *options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def is_idle(server: ServerProcess) -> bool:
    values = server.metrics()
    return values["num_requests_running"] == values["num_requests_waiting"] == values["kv_cache_usage_ratio"] == 0


def slow_stream(client: OpenAI) -> openai.Stream[openai.types.Completion]:
    """A stream that takes a while, with its first token."""
    stream = client.completions.create(prompt=PROMPT, max_tokens=LONG, stream=True, **GREEDY)
    next(stream)
    return stream


def test_completion_is_the_same_streamed_and_whole(client: OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY)
    stream = client.completions.create(
        prompt=PROMPT, max_tokens=40, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == len(PROMPT)


def test_chat_is_the_same_streamed_and_whole(client: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    whole = client.chat.completions.create(messages=messages, max_completion_tokens=30, **GREEDY)
    chunks = list(client.chat.completions.create(messages=messages, max_tokens=30, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"


def test_requests_at_once_get_what_they_get_alone(server: ServerProcess, client: OpenAI) -> None:
    prompts = [f"{PROMPT} number {i}" for i in range(12)]
    alone = [client.completions.create(prompt=one, max_tokens=30, **GREEDY).choices[0].text for one in prompts]
    listed = client.completions.create(prompt=prompts, max_tokens=30, **GREEDY)
    assert [choice.text for choice in listed.choices] == alone

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = [client.completions.create(prompt=one, max_tokens=30, **GREEDY) for one in prompts]
            return [answer.choices[0].text for answer in await asyncio.gather(*answers)]

    assert asyncio.run(ask_all()) == alone


def test_seeded_samples_can_be_had_again(client: OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, n=3, seed=seed, max_tokens=20, temperature=1)
        return [choice.text for choice in answer.choices]

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) == 3


def test_token_ids_are_a_prompt_like_their_text(server: ServerProcess, client: OpenAI) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == PROMPT
    by_text, by_ids = (
        client.completions.create(prompt=prompt, max_tokens=10, **GREEDY).choices[0].text
        for prompt in (PROMPT, tokens["tokens"])
    )
    assert by_text == by_ids


def test_logprobs_of_completion_and_echoed_prompt(client: OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, max_tokens=5, logprobs=3, echo=True, **GREEDY)
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == len(PROMPT) + 5
    assert "".join(logprobs.tokens[: len(PROMPT)]) == PROMPT
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.top_logprobs is not None
    for chosen, top in zip(logprobs.token_logprobs[-5:], logprobs.top_logprobs[-5:], strict=True):
        assert chosen == max(top.values())  # greedy
        assert len(top) <= 4
    scored = client.completions.create(prompt=PROMPT, max_tokens=0, logprobs=3, echo=True, **GREEDY).choices[0]
    assert scored.text == PROMPT
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs[: len(PROMPT)], abs=1e-4)


def test_logprobs_of_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True, top_logprobs=2, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    for token in logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob


def test_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY).choices[0].text
    stop = whole[10:12]
    choice = client.completions.create(prompt=PROMPT, max_tokens=40, stop=stop, **GREEDY).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.model_extra == {"root": model.model_extra["root"], "max_model_len": 256}  # type: ignore[index]
    assert client.models.retrieve(MODEL) == model


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ({"prompt": "x" * 300}, "prompt", "300 tokens but max_model_len is 256"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [5, 128]}, "prompt", "128"),
        ({"prompt": [5, 10**30]}, "prompt", "ids go from 0 to 127"),
        ({"prompt": [5, -1]}, "prompt", "-1"),
        ({"n": 10**30}, "n", "128"),
        ({"logprobs": 10**30}, "logprobs", "100"),
        ({"max_tokens": -1}, "max_tokens", "at least 1"),
        ({"seed": 10**30}, "seed", "64-bit"),
        ({"logit_bias": {"128": 1}}, "logit_bias", "128"),
        ({"logit_bias": {str(10**30): 1}}, "logit_bias", "127"),
        ({"extra_body": {"top_k": 10**30}}, "top_k", "10"),
        ({"extra_body": {"stop_token_ids": [10**30]}}, "stop_token_ids", "127"),
        ({"extra_body": {"min_tokens": 10**30}, "max_tokens": None}, "min_tokens", "min_tokens"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate", "unknown parameter"),
    ],
)
def test_bad_request_is_told_and_leaves_nothing_behind(
    server: ServerProcess, client: OpenAI, arguments: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": MODEL, "prompt": PROMPT, "stream": stream} | arguments)
        assert caught.value.param == param
        assert words in caught.value.message
    assert is_idle(server)


def test_huge_max_tokens_means_as_many_as_fit(client: OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, max_tokens=10**30, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


def test_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="other", prompt=PROMPT)


def num_aborted(server: ServerProcess) -> float:
    return server.metrics().get('requests_total{finish_reason="abort"}', 0.0)


def test_client_that_leaves_a_stream_frees_its_blocks(server: ServerProcess, client: OpenAI) -> None:
    before = num_aborted(server)
    stream = slow_stream(client)
    stream.close()
    wait_until(lambda: num_aborted(server) == before + 1)
    wait_until(lambda: is_idle(server))


def test_client_that_gives_up_waiting_frees_its_blocks(server: ServerProcess) -> None:
    before = num_aborted(server)

    async def give_up() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asking = asyncio.create_task(client.completions.create(prompt=[PROMPT] * 8, n=1, max_tokens=LONG, **GREEDY))
            while await asyncio.to_thread(lambda: server.metrics()["num_requests_running"]) < 8:
                assert not asking.done()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(give_up())
    wait_until(lambda: num_aborted(server) == before + 8)
    wait_until(lambda: is_idle(server))


def test_clients_that_come_and_go_leave_nothing_behind(server: ServerProcess, client: OpenAI) -> None:
    before = client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY).choices[0].text

    async def come_and_go(client: AsyncOpenAI, number: int) -> None:
        stream = await client.completions.create(
            model=MODEL,
            prompt=PROMPT * (1 + number % 5),
            n=1 + number % 3,
            max_tokens=60,
            stream=True,
            seed=number,
            extra_body={"ignore_eos": True},
        )
        async with stream:
            for _ in range(number * 7 % 40):
                await anext(stream)

    async def all_at_once() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(come_and_go(client, number) for number in range(40)))

    asyncio.run(all_at_once())
    wait_until(lambda: is_idle(server))
    assert client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY).choices[0].text == before


def test_metrics_count_what_was_served(server: ServerProcess, client: OpenAI) -> None:
    before = server.metrics()
    for _ in range(2):
        client.completions.create(prompt=PROMPT * 3, max_tokens=7, **GREEDY)
    after = server.metrics()
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 2 * 3 * len(PROMPT)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 14
    assert after["time_to_first_token_seconds_count"] - before["time_to_first_token_seconds_count"] == 2
    assert after["prefix_cache_hits_total"] > before["prefix_cache_hits_total"]


def test_page_and_document_are_there(server: ServerProcess) -> None:
    assert "<title>shardwright</title>" in httpx.get(server.url).text
    assert httpx.get(f"{server.url}/openapi.json").json()["openapi"]


def test_sigterm_lets_running_requests_finish(own_server: Callable[..., ServerProcess]) -> None:
    server = own_server("--api-key", "sesame")
    with OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        stream = slow_stream(client)
        os.killpg(server.process.pid, signal.SIGTERM)  # as service managers do: every process of the group
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.completions.create(prompt=PROMPT, max_tokens=1, model=MODEL)
        assert refused.value.response.headers["retry-after"]
        assert list(stream)[-1].choices[0].finish_reason == "length"
    code, _, err = server.end()
    assert code == 0, err
    assert "Traceback" not in err


def test_dead_engine_is_told_to_everyone(own_server: Callable[..., ServerProcess]) -> None:
    server = own_server()
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = slow_stream(client)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (core,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        core.kill()
        with pytest.raises(openai.APIError, match="engine core process ended"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="engine core process ended"):
            client.completions.create(prompt=PROMPT, model=MODEL)
    assert httpx.get(f"{server.url}/health").status_code == 503
    server.process.terminate()
    assert server.end()[0] == 0

"""Embeddings and classifications over HTTP, from an engine without a model."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from tests.server.conftest import MakeClient
from tests.server.fake_engine import AlphabetEngine

A, B, C = map(float, map(ord, "abc"))


@pytest.fixture
def engine() -> AlphabetEngine:
    return AlphabetEngine(task="embed")


async def embed(client: httpx.AsyncClient, text: Any, **fields: Any) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": "alphabet", "input": text, **fields})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", [[3, A, C]]),
        (["abc", "b"], [[3, A, C], [1, B, B]]),
        ([97, 98], [[2, A, B]]),
        ([[97, 98], [99]], [[2, A, B], [1, C, C]]),
    ],
)
async def test_every_form_of_input(client: httpx.AsyncClient, text: Any, expected: list[list[float]]) -> None:
    response = await embed(client, text)
    body = response.json()
    assert (response.status_code, body["object"], body["model"]) == (200, "list", "alphabet")
    assert [one["embedding"] for one in body["data"]] == expected
    assert [(one["object"], one["index"]) for one in body["data"]] == [
        ("embedding", index) for index in range(len(expected))
    ]
    num_tokens = sum(numbers[0] for numbers in expected)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_base64_holds_the_same_numbers(client: httpx.AsyncClient) -> None:
    [one] = (await embed(client, "abc", encoding_format="base64")).json()["data"]
    assert np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4").tolist() == [3, A, C]


async def test_dimensions_and_truncation_are_passed_on(client: httpx.AsyncClient) -> None:
    [one] = (await embed(client, "abc", dimensions=2, truncate_prompt_tokens=1)).json()["data"]
    assert one["embedding"] == [1, A]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": []}, "input", "input is an empty list"),
        ({"input": ""}, "input", "empty"),
        ({"input": {"text": "a"}}, "input", "a string, a list of strings"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": [97, 1000]}, "input", "out of range"),
        ({"input": "a" * 100}, "input", "100 tokens"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown parameter"),
    ],
)
async def test_bad_requests_name_the_field(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, says: str
) -> None:
    response = await client.post("/v1/embeddings", json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/classify", {"input": "a"}),
    ],
)
async def test_an_embedder_says_what_to_ask_instead(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    response = await client.post(path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "model")
    assert "embeds texts" in error["message"]
    assert "/v1/embeddings" in error["message"]


async def test_a_generator_says_how_it_could_embed(engine: AlphabetEngine, make_client: MakeClient) -> None:
    engine.info = AlphabetEngine().info
    response = await embed(make_client(), "a")
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
    assert "--task embed" in response.json()["error"]["message"]


async def test_unknown_model_comes_before_the_task(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "other", "prompt": "a"})
    assert response.status_code == 404


async def test_tokenizing_works_without_generation(client: httpx.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={"prompt": "ab"})).json()["tokens"] == [97, 98]


async def test_classification_in_the_order_of_texts(engine: AlphabetEngine, make_client: MakeClient) -> None:
    engine.info = AlphabetEngine(task="classify").info
    response = await make_client().post("/classify", json={"input": ["abcd", "a"]})
    body = response.json()
    assert response.status_code == 200
    assert [one["label"] for one in body["data"]] == ["long", "short"]
    assert body["data"][0] | {"index": 0, "probs": [0.25, 0.75], "num_classes": 2} == body["data"][0]
    assert body["usage"]["prompt_tokens"] == 5


async def test_metrics_count_what_was_read(client: httpx.AsyncClient) -> None:
    await embed(client, ["abc", "b"])
    await embed(client, [])
    text = (await client.get("/metrics")).text
    assert "shardwright_prompt_tokens_total 4.0" in text
    assert 'shardwright_requests_total{finish_reason="stop"} 1.0' in text


async def test_status_says_what_the_model_does(client: httpx.AsyncClient) -> None:
    assert (await client.get("/status")).json()["task"] == "embed"

"""Scores and rankings over HTTP, from an engine without a model."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.server.conftest import MakeClient
from tests.server.fake_engine import AlphabetEngine

DOCUMENTS = ["xyz", "abcd", "ab"]


@pytest.fixture(params=["embed", "classify"])
def engine(request: pytest.FixtureRequest) -> AlphabetEngine:
    return AlphabetEngine(task=request.param)


async def rerank(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/rerank", json={"model": "alphabet", "query": "abc", "documents": DOCUMENTS} | fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text_1": "abc"}, [3.0]),
        ({"text_1": ["abc", "b"]}, [3.0, 1.0]),
        ({"text_1": "ab", "text_2": "bc"}, [0.5]),
        ({"text_1": "ab", "text_2": ["bc", "cd", "ba"]}, [0.5, 0.0, 1.0]),
        ({"text_1": ["ab", "cd"], "text_2": ["bc", "cd"]}, [0.5, 1.0]),
        ({"text_1": [97, 98], "text_2": [[98], [99]]}, [0.5, 0.0]),
    ],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_scores_in_the_order_of_texts(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], expected: list[float]
) -> None:
    response = await client.post(path, json=fields)
    body = response.json()
    assert (response.status_code, body["object"], body["model"]) == (200, "list", "alphabet")
    assert body["id"].startswith("score-")
    assert body["data"] == [{"index": i, "object": "score", "score": score} for i, score in enumerate(expected)]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_the_most_relevant_comes_first(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"query": "abc", "documents": [DOCUMENTS[0], {"text": "abcd"}, "ab"]})
    body = response.json()
    assert response.status_code == 200
    assert body["results"] == [
        {"index": 1, "relevance_score": 1.0, "document": {"text": "abcd"}},
        {"index": 2, "relevance_score": pytest.approx(2 / 3), "document": {"text": "ab"}},
        {"index": 0, "relevance_score": 0.0, "document": {"text": "xyz"}},
    ]
    assert body["usage"] == {"prompt_tokens": 18, "total_tokens": 18}


async def test_equal_documents_keep_their_order(client: httpx.AsyncClient) -> None:
    results = (await rerank(client, documents=["b", "a", "xa", "c"])).json()["results"]
    assert [one["index"] for one in results] == [0, 1, 2, 3]


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (2, 2), (3, 3), (9, 3), (0, 3), (None, 3)])
async def test_as_many_as_asked_for(client: httpx.AsyncClient, top_n: int | None, count: int) -> None:
    results = (await rerank(client, top_n=top_n)).json()["results"]
    assert [one["index"] for one in results] == [1, 2, 0][:count]


async def test_documents_are_left_out_on_request(client: httpx.AsyncClient) -> None:
    for one in (await rerank(client, return_documents=False)).json()["results"]:
        assert set(one) == {"index", "relevance_score"}


async def test_truncation_is_passed_on(client: httpx.AsyncClient) -> None:
    assert (await rerank(client, truncate_prompt_tokens=1)).json()["usage"]["prompt_tokens"] == 12


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        ("/score", {"text_1": []}, "text_1", "empty list"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2", "empty list"),
        ("/score", {"text_1": "a", "text_2": ["b", ""]}, "text_2[1]", "empty"),
        ("/score", {"text_2": "a"}, "text_1", "missing"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "empty list"),
        ("/rerank", {"query": "a", "documents": ["b", ""]}, "documents[1]", "empty"),
        ("/rerank", {"query": "a", "documents": "b"}, "documents", "a list of strings"),
        ("/rerank", {"query": "a", "documents": [{"image": "b"}]}, "documents", "objects with a text"),
        ("/rerank", {"query": ["a"], "documents": ["b"]}, "query", "string"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "at least 1"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_chunks": 1}, "max_chunks", "unknown parameter"),
    ],
)
async def test_bad_requests_name_the_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    response = await client.post(path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"].lower()


async def test_a_generator_does_not_score(engine: AlphabetEngine, make_client: MakeClient) -> None:
    engine.info = AlphabetEngine().info
    for response in (await make_client().post("/score", json={"text_1": "a"}), await rerank(make_client())):
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        assert "does not score" in response.json()["error"]["message"]


async def test_metrics_count_what_was_read(client: httpx.AsyncClient) -> None:
    await rerank(client)
    assert "shardwright_prompt_tokens_total 18.0" in (await client.get("/metrics")).text

"""Whatever a client sends, it is told what is wrong, or gets an answer: never a failure of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.fake_engine import AlphabetEngine

from shardwright.server import ServerConfig, build_app
from shardwright.server.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    ScoreBody,
    TokenizeBody,
)

BODIES = {
    "/v1/completions": (CompletionBody, {"prompt": "a"}),
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
    "/v1/embeddings": (EmbeddingBody, {"input": "a"}),
    "/score": (ScoreBody, {"text_1": "a"}),
    "/rerank": (RerankBody, {"query": "a", "documents": ["a"]}),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [97]}),
}

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
LIKELY = st.sampled_from(
    [0, 1, 2, -1, 0.5, 2**31, 2**63, 10**30, "", "a", [], ["a"], [97], [[97]], {}, {"97": 1}, True]
)
VALUES = LIKELY | st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


async def post(path: str, body: dict[str, Any]) -> httpx.Response:
    engine = AlphabetEngine(task="embed" if path in ("/v1/embeddings", "/score", "/rerank") else "generate")
    transport = httpx.ASGITransport(build_app(engine, ServerConfig()))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("path", BODIES)
def test_any_body_is_answered_or_refused(path: str) -> None:
    schema, base = BODIES[path]

    @given(st.dictionaries(st.sampled_from(sorted(schema.model_fields)), VALUES, max_size=3))
    @settings(max_examples=100, deadline=None)
    def check(fields: dict[str, Any]) -> None:
        response = asyncio.run(post(path, base | fields))
        assert response.status_code in {200, 400, 404}, response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()

from __future__ import annotations

import httpx
import pytest
from tests.server.conftest import MakeClient

pytestmark = pytest.mark.asyncio

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a",}',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 5000,
        '{"prompt": "a"}'.encode("utf-16"),
    ],
)
async def test_body_that_is_no_json_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert "not valid JSON in UTF-8" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"[]", None, "the body must be a JSON object, got []"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": {"a": 1}}', "prompt", "prompt must be a string, a list of strings, a list of token ids or"),
        (b'{"prompt": [1, true]}', "prompt", "prompt must be a string"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens", "max_tokens is '5': it should be a valid integer"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens", "max_tokens is True"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens", "max_tokens is 1.5"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature", "temperature is 'hot'"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", "temperature must be a number"),
        (b'{"prompt": "a", "stop": [1]}', "stop", "stop must be a string or a list of strings"),
        (
            b'{"prompt": "a", "logit_bias": {"x": 1}}',
            "logit_bias.x",
            "logit_bias.x is 'x': it should be a valid integer",
        ),
        (b'{"prompt": "a", "max_token": 5}', "max_token", "unknown parameter max_token: did you mean max_tokens?"),
        (b'{"prompt": "a", "frobnicate": 5}', "frobnicate", "unknown parameter frobnicate"),
        (b'{"prompt": "a", "best_of": 3}', "best_of", "best_of is not supported"),
        (b'{"prompt": "a", "suffix": "x"}', "suffix", "suffix is not supported"),
        (b'{"prompt": "a", "stream": true, "stream_options": {"usage": true}}', "stream_options.usage", "unknown"),
        (b'{"prompt": "a", "priority": 99999999999}', "priority", "less than"),
    ],
)
async def test_body_that_does_not_fit_names_the_field(
    client: httpx.AsyncClient, body: bytes, param: str | None, message: str
) -> None:
    response = await client.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


async def test_long_values_are_cut_in_the_message(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": "5" * 10_000})
    assert len(response.json()["error"]["message"]) < 200


async def test_body_without_content_type_is_read_as_json(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", content=b'{"prompt": "a"}')
    assert response.status_code == 200


async def test_form_is_told_to_be_json(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", data={"prompt": "a"})
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


async def test_huge_body_is_refused(make_client: MakeClient) -> None:
    response = await make_client(max_body_bytes=100).post("/v1/completions", json={"prompt": "a" * 200})
    assert response.status_code == 413

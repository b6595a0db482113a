from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from tests.server.conftest import MakeClient
from tests.server.fake_engine import AlphabetEngine

from shardwright.server.lifecycle import Lifecycle

pytestmark = pytest.mark.asyncio


async def test_models_lists_the_model_with_its_length(client: httpx.AsyncClient) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert card["id"] == "alphabet"
    assert card["object"] == "model"
    assert card["max_model_len"] == 64
    assert (await client.get("/v1/models/alphabet")).json() == card


async def test_served_name_replaces_the_models_own(make_client: MakeClient) -> None:
    client = make_client(served_model_name="org/letters")
    assert (await client.get("/v1/models/org/letters")).json()["id"] == "org/letters"
    assert (await client.post("/v1/completions", json={"model": "alphabet", "prompt": "a"})).status_code == 404
    answer = (await client.post("/v1/completions", json={"model": "org/letters", "prompt": "a"})).json()
    assert answer["model"] == "org/letters"


async def test_model_named_by_an_absolute_path_can_be_asked_for(make_client: MakeClient) -> None:
    client = make_client(served_model_name="/models/alphabet")
    assert (await client.get("/v1/models//models/alphabet")).status_code == 200
    assert (await client.get("/v1/models/models/alphabet")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/other", None),
        ("POST", "/v1/completions", {"model": "other", "prompt": "a"}),
        ("POST", "/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/tokenize", {"model": "other", "prompt": "a"}),
    ],
)
async def test_unknown_model_is_a_404_that_names_the_known_one(
    client: httpx.AsyncClient, method: str, path: str, body: Any
) -> None:
    response = await client.request(method, path, json=body)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["message"] == "there is no model 'other': this server has 'alphabet'"
    assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_unknown_route_and_method_have_error_bodies(client: httpx.AsyncClient) -> None:
    unknown = await client.post("/v1/frobnicate", json={})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "not_found"
    wrong = await client.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == "/v1/completions takes POST, not GET"


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "abc", "return_token_strs": True})).json()
    assert answer == {"count": 3, "max_model_len": 64, "tokens": [97, 98, 99], "token_strs": ["a", "b", "c"]}
    back = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": "abc"}


async def test_messages_are_tokenized_by_the_template(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "a"}]
    answer = (await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert bytes(answer["tokens"]) == b"<user>a"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "either prompt or messages"),
        ("/tokenize", {"messages": []}, "empty"),
        ("/detokenize", {"tokens": [97, 128]}, "tokens holds 128, but ids go from 0 to 127"),
        ("/detokenize", {"tokens": [-1]}, "ids go from 0"),
        ("/detokenize", {"tokens": "abc"}, "tokens is 'abc': it should be a valid array"),
        ("/detokenize", {}, "tokens is missing"),
    ],
)
async def test_bad_tokenization_request_is_a_400(client: httpx.AsyncClient, path: str, body: Any, words: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


async def test_health_tells_of_dead_engine_and_of_draining(make_client: MakeClient, engine: AlphabetEngine) -> None:
    lifecycle = Lifecycle(max_requests=4, drain_timeout_s=1)
    client = make_client(lifecycle=lifecycle)
    assert (await client.get("/health")).status_code == 200
    engine.is_alive = False
    assert (await client.get("/health")).status_code == 503
    engine.is_alive = True
    lifecycle.start_draining()
    response = await client.get("/health")
    assert response.status_code == 503
    assert "retry-after" in response.headers


async def test_version_and_status(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    assert re.match(r"\d+\.\d+", (await client.get("/version")).json()["version"])
    status = (await client.get("/status")).json()
    assert (status["state"], status["model"], status["dtype"]) == ("ready", "alphabet", "float32")
    engine.is_alive = False
    assert (await client.get("/status")).json()["state"] == "dead"


async def test_page_is_whole_in_itself(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in response.headers["content-security-policy"]
    assert not re.search(r'(src|href)="(https?:)?//', response.text)


async def test_document_describes_bodies_and_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert "max_tokens" in schemas["CompletionBody"]["properties"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', str(document).replace("'", '"')))
    assert references <= set(schemas)
    assert "422" not in document["paths"]["/v1/models/{model_id}"]["get"]["responses"]


class TestKey:
    @pytest.fixture
    def client(self, make_client: MakeClient) -> httpx.AsyncClient:
        return make_client(api_key="sésame")

    @pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic sésame", "sésame"])
    async def test_missing_or_wrong_key_is_a_401(self, client: httpx.AsyncClient, header: str | None) -> None:
        headers = {} if header is None else {"Authorization": header.encode()}
        for method, path in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/x")]:
            response = await client.request(method, path, headers=headers)  # type: ignore[arg-type]
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"

    async def test_right_key_is_let_in(self, make_client: MakeClient) -> None:
        response = await make_client(api_key="sesame").get("/v1/models", headers={"Authorization": "bearer sesame"})
        assert response.status_code == 200

    async def test_key_comes_from_the_environment_too(
        self, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SHARDWRIGHT_API_KEY", "sesame")
        assert (await make_client().get("/v1/models")).status_code == 401

    @pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/version", "/status"])
    async def test_state_is_open(self, client: httpx.AsyncClient, path: str) -> None:
        assert (await client.get(path)).status_code == 200

    async def test_web_pages_of_other_origins_may_ask_what_is_allowed(self, client: httpx.AsyncClient) -> None:
        headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
        response = await client.options("/v1/completions", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "*"


async def test_only_allowed_origins_are_let_in(make_client: MakeClient) -> None:
    client = make_client(allowed_origins="http://good, http://fine")
    for origin, allowed in [("http://fine", "http://fine"), ("http://bad", None)]:
        response = await client.get("/v1/models", headers={"Origin": origin})
        assert response.headers.get("access-control-allow-origin") == allowed

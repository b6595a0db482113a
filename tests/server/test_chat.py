from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.server.asgi import events
from tests.server.conftest import MakeClient
from tests.server.fake_engine import MAX_MODEL_LEN, AlphabetEngine, AsciiTokenizer

pytestmark = pytest.mark.asyncio

HELLO = [{"role": "user", "content": "hi"}]
"""Becomes `<user>hi<assistant>`, 19 tokens."""


async def chat(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/chat/completions", json={"messages": HELLO} | body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_text(engine: AlphabetEngine) -> str:
    ((prompt, _, _),) = engine.requests.values()
    return engine.tokenizer.decode([token for token in prompt if isinstance(token, int)])


async def test_answer_has_openai_shape(client: httpx.AsyncClient) -> None:
    answer = await chat(client, model="alphabet", max_tokens=3)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == 19
    assert answer["usage"]["total_tokens"] == 22


async def test_default_is_as_many_tokens_as_fit(client: httpx.AsyncClient) -> None:
    answer = await chat(client)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit_count(client: httpx.AsyncClient, name: str) -> None:
    answer = await chat(client, **{name: 5})
    assert answer["usage"]["completion_tokens"] == 5


async def test_stream_says_who_speaks_then_what(client: httpx.AsyncClient) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/chat/completions", json=body)
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2


async def test_every_choice_of_a_stream_begins_with_its_role(client: httpx.AsyncClient) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 2, "n": 2}
    chunks = events((await client.post("/v1/chat/completions", json=body)).text)[:-1]
    for index in (0, 1):
        mine = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["role"] == "assistant"
        assert len(mine) == 3


async def test_logprobs_have_bytes_and_just_the_likeliest(client: httpx.AsyncClient) -> None:
    answer = await chat(client, max_tokens=1, logprobs=True, top_logprobs=2)
    assert answer["choices"][0]["logprobs"]["content"] == [
        {
            "token": "a",
            "logprob": -0.3,
            "bytes": [97],
            "top_logprobs": [
                {"token": "#1", "logprob": -0.1, "bytes": [35, 49]},
                {"token": "#2", "logprob": -0.2, "bytes": [35, 50]},
            ],
        }
    ]


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    answer = await chat(client, max_tokens=1, logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_prompt_logprobs_stand_beside_the_choices(client: httpx.AsyncClient) -> None:
    answer = await chat(client, max_tokens=1, prompt_logprobs=0)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_text_parts_are_joined_and_developers_are_heard_as_the_system(
    client: httpx.AsyncClient, engine: AlphabetEngine
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await chat(client, messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    assert prompt_text(engine) == "<system>x<user>a\nb<assistant>"


async def test_answer_can_be_sent_back_as_it_came(client: httpx.AsyncClient) -> None:
    message = (await chat(client, max_tokens=2))["choices"][0]["message"]
    await chat(client, messages=[*HELLO, message | {"tool_calls": None, "annotations": []}, *HELLO], max_tokens=1)


async def test_final_message_is_continued(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    await chat(
        client, messages=[*HELLO, {"role": "assistant", "content": "ab"}], continue_final_message=True, max_tokens=1
    )
    assert prompt_text(engine) == "<user>hi<assistant>ab"


async def test_template_variables_reach_the_template(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    await chat(client, chat_template_kwargs={"think": False}, max_tokens=1, add_generation_prompt=False)
    assert prompt_text(engine) == "<user>hi[think=False]"


async def test_template_of_the_server_replaces_the_tokenizers(make_client: MakeClient, engine: AlphabetEngine) -> None:
    engine.tokenizer = AsciiTokenizer(has_chat_template=False)
    await chat(make_client(chat_template="{{ mine }}"), max_tokens=1)
    assert prompt_text(engine).startswith("{{ mine }}")


async def test_harmless_fields_of_openai_are_accepted(client: httpx.AsyncClient) -> None:
    await chat(
        client,
        max_tokens=1,
        user="me",
        store=False,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        stream_options=None,
    )


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        (
            {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[1].content",
            "text only",
        ),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents", "unknown parameter"),
        ({"messages": [{"role": "user", "content": "a" * 70}]}, "messages", "87 tokens but max_model_len is 64"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 10**9}, "top_logprobs", "100"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "one of them"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "contradicts"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "may not set chat_template"),
    ],
)
async def test_bad_request_is_told_what_is_wrong(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, words: str
) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": HELLO} | body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param


async def test_tokenizer_without_template_is_a_clear_error(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    engine.tokenizer = AsciiTokenizer(has_chat_template=False)
    response = await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]

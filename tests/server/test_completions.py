from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.server.asgi import events
from tests.server.fake_engine import AlphabetEngine, AsciiTokenizer, alternatives

from shardwright.outputs import CompletionOutput, RequestOutput
from shardwright.sampling_params import SamplingParams
from shardwright.server.completions import ChoiceMaker
from shardwright.server.schemas import CompletionBody

pytestmark = pytest.mark.asyncio


async def complete(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **body: Any) -> list[Any]:
    response = await client.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    return chunks


async def test_answer_has_openai_shape(client: httpx.AsyncClient) -> None:
    answer = await complete(client, model="alphabet", prompt="abcd", max_tokens=3)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "alphabet"
    assert answer["choices"] == [
        {"index": 0, "text": "efg", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_token_ids_come_with_the_text_if_asked_for(client: httpx.AsyncClient) -> None:
    [choice] = (await complete(client, prompt="ab", max_tokens=2, return_token_ids=True))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], [99, 100])
    chunks = await stream(client, prompt="ab", max_tokens=2, return_token_ids=True)
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[99], [100]]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[97, 98], None]


async def test_default_is_sixteen_tokens(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="a")
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["cd"]),
        (["ab", "x"], ["cd", "yz"]),
        ([97, 98], ["cd"]),
        ([[97, 98], [120]], ["cd", "yz"]),
    ],
)
async def test_every_form_of_prompt(client: httpx.AsyncClient, prompt: Any, texts: list[str]) -> None:
    answer = await complete(client, prompt=prompt, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == texts


async def test_choices_of_prompts_and_n_are_numbered_through(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["a", "k"], n=2, max_tokens=2)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "bc"),
        (1, "cd"),
        (2, "lm"),
        (3, "mn"),
    ]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 8


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "max_tokens": 3,
        "min_tokens": 1,
        "stop": ["x", "y"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    await complete(client, prompt="a", priority=-3, logit_bias={"5": 1, "6": -100}, logprobs=3, **fields)
    ((_, params, priority),) = engine.requests.values()
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {5: 1.0, 6: -100.0}
    assert params.logprobs == 3
    assert priority == -3


async def test_null_means_default(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    await complete(
        client, prompt="a", temperature=None, max_tokens=None, stop=None, n=None, stream=None, logit_bias=None
    )
    ((_, params, _),) = engine.requests.values()
    assert (params.temperature, params.max_tokens, params.n) == (1.0, 16, 1)


async def test_harmless_fields_of_openai_are_ignored(client: httpx.AsyncClient) -> None:
    await complete(
        client, prompt="a", user="me", store=True, metadata={"a": "b"}, service_tier="auto", best_of=1, suffix=None
    )


async def test_stop_token_is_named_as_the_reason(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="a", stop_token_ids=[ord("d")])
    assert answer["choices"][0]["text"] == "bc"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == ord("d")


async def test_logprobs_are_parallel_lists(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="ab", max_tokens=2, logprobs=1)
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [-0.3, -0.3],
        "tokens": ["c", "d"],
        "top_logprobs": [{"#1": -0.1, "c": -0.3}, {"#1": -0.1, "d": -0.3}],
    }


async def test_zero_logprobs_give_the_chosen_token_alone(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="ab", max_tokens=1, logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"c": -0.3}]


async def test_echo_puts_the_prompt_before_the_text(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["ab", "x"], max_tokens=2, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["abcd", "xyz"]


async def test_echo_of_token_ids_is_their_text(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=[97, 98], max_tokens=2, echo=True)
    assert answer["choices"][0]["text"] == "abcd"


async def test_echo_with_logprobs_covers_the_prompt(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="ab", max_tokens=1, echo=True, logprobs=0)
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -0.3, -0.3],
        "tokens": ["a", "b", "c"],
        "top_logprobs": [None, {"b": -0.3}, {"c": -0.3}],
    }


@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_with_no_tokens_scores_the_prompt(client: httpx.AsyncClient, streamed: bool) -> None:
    body = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = (await stream(client, **body))[0] if streamed else await complete(client, **body)
    (choice,) = answer["choices"]
    assert choice["text"] == "ab"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    if not streamed:
        assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_have_the_shape_of_vllm(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="ab", max_tokens=1, prompt_logprobs=1)
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.3, "rank": 3, "decoded_token": "b"},
            "1001": {"logprob": -0.1, "rank": 1, "decoded_token": "#1"},
        },
    ]


async def test_stream_brings_the_same_text_in_pieces(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, prompt="ab", max_tokens=3)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["c", "d", "e"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_streams_of_several_prompts_are_told_apart(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, prompt=["a", "k"], n=2, max_tokens=3, echo=True)
    texts: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "abcd", 1: "acde", 2: "klmn", 3: "kmno"}


async def test_stream_reports_usage_last(client: httpx.AsyncClient) -> None:
    *chunks, last = await stream(client, prompt="abcd", max_tokens=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6


async def test_stream_reports_usage_all_along_when_asked(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, prompt="ab", max_tokens=2, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


async def test_text_offsets_go_on_over_the_stream(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, prompt="ab", max_tokens=3, logprobs=0, echo=True)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0, 1, 2], [3], [4]]


async def test_request_id_is_a_header_and_names_the_engine_request(
    client: httpx.AsyncClient, engine: AlphabetEngine
) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert response.headers["x-request-id"] == response.json()["id"]
    assert list(engine.requests) == [f"{response.json()['id']}-0"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [[97], []]}, "prompt", "empty"),
        ({"prompt": [97, 4000]}, "prompt", "range"),
        ({"prompt": "a" * 70}, "prompt", "70 tokens but max_model_len is 64"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
        ({"prompt": "a", "temperature": -1}, "temperature", "-1"),
        ({"prompt": "a", "temperature": 0, "n": 2}, "n", "same completion"),
        ({"prompt": "a", "n": 10**9}, "n", "128"),
        ({"prompt": "a", "logprobs": 10**9}, "logprobs", "100"),
        ({"prompt": "a", "min_tokens": 20}, "min_tokens", "more than max_tokens"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
        ({"prompt": ["a"] * 1025}, None, "--max-queued-requests 1025"),
    ],
)
async def test_bad_request_is_told_what_is_wrong(
    client: httpx.AsyncClient, body: dict[str, Any], param: str | None, words: str
) -> None:
    for streamed in {False, bool(body.get("stream", "stream_options" not in body))}:
        response = await client.post("/v1/completions", json={"stream": streamed} | body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert words in error["message"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"


async def test_bad_prompt_among_good_ones_ends_them_all(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    response = await client.post("/v1/completions", json={"prompt": ["a", "", "b"], "max_tokens": 50})
    assert response.status_code == 400
    assert not engine.running


async def test_echoed_logprobs_reach_a_choice_that_starts_after_they_came() -> None:
    params = SamplingParams(n=2, logprobs=0, prompt_logprobs=0)
    maker = ChoiceMaker(CompletionBody(prompt="ab", echo=True, logprobs=0), params, AsciiTokenizer())

    def delta(index: int, letter: str) -> RequestOutput:
        completion = CompletionOutput(
            index=index, text=letter, token_ids=[ord(letter)], logprobs=[alternatives(ord(letter), 0)]
        )
        return RequestOutput(
            request_id="x", prompt="ab", prompt_token_ids=[97, 98], outputs=[completion], finished=False
        )

    first = delta(0, "c")
    first.prompt_logprobs = [None, alternatives(98, 0)]
    for output in (first, delta(1, "d")):
        (choice,) = maker.make(0, output)
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == list(choice.text)
        assert choice.logprobs.text_offset == [0, 1, 2]

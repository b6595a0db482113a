"""The real server process with a tiny encoder, asked by the real `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from tests.pooling.models import bert_config, save
from tests.server.process import ServerProcess, free_port
from transformers import BertModel

from shardwright import LLM

pytestmark = pytest.mark.slow

TEXTS = ["Once upon a time", "the sea", "x" * 30]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    save(BertModel, bert_config(), directory)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[ServerProcess]:
    port = free_port()
    command = ["-m", "shardwright", "serve", str(directory), "--port", str(port), "--served-model-name", "tiny"]
    server = ServerProcess(*command, "--pooling", "cls", port=port)
    try:
        server.wait_until_ready()
        yield server
        server.process.terminate()
        code, _, err = server.end()
        assert (code, "Traceback" in err) == (0, False), err
    finally:
        server.kill()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_both_encodings_hold_the_embeddings_of_the_library(client: OpenAI, directory: Path) -> None:
    with LLM(str(directory), pooling="cls") as llm:
        expected = [output.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
    for answer in (
        client.embeddings.create(model="tiny", input=TEXTS),  # the client asks for base64 unless told otherwise
        client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float"),
    ):
        np.testing.assert_allclose([one.embedding for one in answer.data], expected, atol=1e-6)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, TEXTS))


def test_token_ids_are_texts_too(client: OpenAI, server: ServerProcess) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": TEXTS[0]}).json()["tokens"]
    by_ids = client.embeddings.create(model="tiny", input=[tokens, tokens])
    by_text = client.embeddings.create(model="tiny", input=TEXTS[0])
    np.testing.assert_allclose([one.embedding for one in by_ids.data], [by_text.data[0].embedding] * 2, atol=1e-6)


def test_scores_and_ranks_are_those_of_the_library(server: ServerProcess, directory: Path) -> None:
    with LLM(str(directory), pooling="cls") as llm:
        expected = [output.score for output in llm.score(TEXTS[0], TEXTS, use_tqdm=False)]
    assert np.argmax(expected) == 0
    answer = httpx.post(f"{server.url}/score", json={"text_1": TEXTS[0], "text_2": TEXTS})
    assert answer.status_code == 200, answer.text
    scores = answer.json()["data"]
    np.testing.assert_allclose([one["score"] for one in scores], expected, atol=1e-5)
    body = {"model": "tiny", "query": TEXTS[0], "documents": TEXTS, "top_n": 2}
    ranked = httpx.post(f"{server.url}/v1/rerank", json=body).json()["results"]
    assert [one["index"] for one in ranked] == np.argsort(expected)[::-1][:2].tolist()
    assert [one["document"]["text"] for one in ranked] == [TEXTS[one["index"]] for one in ranked]
    np.testing.assert_allclose([one["relevance_score"] for one in ranked], sorted(expected)[::-1][:2], atol=1e-5)
    refused = httpx.post(f"{server.url}/score", json={"text_1": TEXTS[0]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text_2")


def test_what_cannot_be_done_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not trained to be cut"):
        client.embeddings.create(model="tiny", input="a", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="65 tokens"):
        client.embeddings.create(model="tiny", input=["a", "x" * 65])
    with pytest.raises(openai.BadRequestError, match="embeds texts"):
        client.completions.create(model="tiny", prompt="a")
    with pytest.raises(openai.BadRequestError, match="embeds texts"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], stream=True)

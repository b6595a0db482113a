"""Embeddings from a core in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from tests.pooling.models import bert_config, save
from transformers import BertModel

from shardwright import LLM, AsyncLLM
from shardwright.errors import EngineDeadError, RequestError

pytestmark = pytest.mark.slow  # every core process takes seconds to start


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    save(BertModel, bert_config(), directory)
    return directory


@pytest_asyncio.fixture
async def engine(directory: Path) -> AsyncIterator[AsyncLLM]:
    engine = AsyncLLM(str(directory))
    yield engine
    engine.close()


async def test_callers_share_batches_and_get_their_own(engine: AsyncLLM, directory: Path) -> None:
    texts = [f"text {number} " + "and more " * (number % 5) for number in range(40)]
    answers = await asyncio.gather(*(engine.embed(texts[i : i + 4]) for i in range(0, 40, 4)))
    with LLM(str(directory)) as llm:
        expected = [output.embedding for output in llm.embed(texts, use_tqdm=False)]
    outputs = [output for answer in answers for output in answer]
    assert [output.prompt for output in outputs] == texts
    np.testing.assert_allclose([output.embedding for output in outputs], expected, atol=1e-5)
    assert engine.num_unfinished == 0
    assert engine.stats.num_steps < len(texts) / 2
    assert await engine.embed([]) == []


async def test_scores_are_those_of_the_library(engine: AsyncLLM, directory: Path) -> None:
    with LLM(str(directory)) as llm:
        expected = [output.score for output in llm.score("sea", ["seas", "x"], use_tqdm=False)]
    scores = [output.score for output in await engine.score("sea", ["seas", "x"])]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


async def test_what_nobody_waits_for_is_not_read(engine: AsyncLLM) -> None:
    await engine.embed("warm")
    waiting = asyncio.create_task(engine.embed(["x" * 64] * 20_000))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engine.num_unfinished == 0
    await engine.embed("next")
    assert engine.stats.num_computed_tokens < 64 * 20_000


async def test_errors_reach_the_caller(engine: AsyncLLM) -> None:
    with pytest.raises(RequestError, match="ids go from 0 to 127"):
        await engine.embed([5, 128])
    with pytest.raises(RequestError, match="embeds texts"):
        await anext(engine.generate("a"))
    with pytest.raises(RequestError, match="embeds texts"):
        await engine.classify("a")
    waiting = asyncio.create_task(engine.embed(["x" * 64] * 1000))
    await asyncio.sleep(0)
    engine.close()
    with pytest.raises(EngineDeadError):
        await waiting
    with pytest.raises(EngineDeadError):
        await engine.embed("a")

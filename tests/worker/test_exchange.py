"""Parts of a model's code are exchanged only where it gives the same afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tests.kernels.triton import plain
from torch import Tensor

from shardwright import LLM, SamplingParams
from shardwright.attention import triton as backend
from shardwright.kernels import gated as plain_gated
from shardwright.kernels import norm as plain_norm
from shardwright.kernels.triton import gated, norm

PROMPTS = [{"prompt_token_ids": prompt} for prompt in ([5, 9, 17], [*range(20, 39)])]


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes long."""
    monkeypatch.setattr(backend, "paged_attention", plain.paged_attention)
    monkeypatch.setattr(backend, "store_rows", plain.store_rows)


def generate(path: Path, **options: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(str(path), block_size=4, max_model_len=32, max_num_seqs=2, **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def doubled(*args: Any) -> Tensor:
    return 2 * plain_norm.norm(*args)


def failing(*args: Any) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (plain_norm.norm, "kernels of our own compute 5 norms and 2 gated activations"),
        (doubled, "norms and activations run the model's own code: logits differ"),
        (failing, "norms and activations run the model's own code: RuntimeError: no such instruction"),
    ],
)
def test_tokens_are_those_of_the_code(
    tiny_llama: Path, kernel: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="shardwright")
    monkeypatch.setattr(norm, "norm", kernel)
    monkeypatch.setattr(gated, "gated", plain_gated.gated)
    assert generate(tiny_llama, attention_backend="triton") == generate(tiny_llama)
    assert said in caplog.text
    assert "computes whole sequences" not in caplog.text

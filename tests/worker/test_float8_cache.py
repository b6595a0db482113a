"""A cache of 8-bit numbers: half the memory, nearly the same logits, and an error where there is none."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tests.kernels.triton import plain
from transformers import DeepseekV3Config, MambaConfig

from shardwright import LLM, SamplingParams
from shardwright.attention import triton as backend
from shardwright.config import EngineConfig
from shardwright.errors import ConfigError
from shardwright.worker.worker import Worker

PROMPTS = [{"prompt_token_ids": prompt} for prompt in ([5, 9, 17], [*range(20, 39)])]
OPTIONS = {"block_size": 4, "max_model_len": 32, "max_num_seqs": 2, "kv_cache_dtype": "fp8"}


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes long."""
    monkeypatch.setattr(backend, "paged_attention", plain.paged_attention)
    monkeypatch.setattr(backend, "store_rows", plain.store_rows)


@pytest.mark.usefixtures("plain_attention")
def test_tokens_take_a_byte_a_number(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shardwright")
    num_bytes, tokens = [], []
    for more in ({}, {"kv_cache_dtype": "auto"}):
        options = {"attention_backend": "triton", **OPTIONS, **more}
        num_bytes.append(Worker(EngineConfig.from_options(str(tiny_llama), **options)).report.bytes_per_block)
        with LLM(str(tiny_llama), **options) as llm:
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            tokens.append([output.outputs[0].token_ids for output in outputs])
    assert num_bytes[1] == 4 * num_bytes[0]  # float32
    assert [len(one) for one in tokens[0]] == [4, 4]
    difference = re.search(r"kept in 8 bits: logits differ by (\S+) of their spread", caplog.text)
    assert difference is not None
    assert 0 < float(difference[1]) < 0.1


def test_other_kernels_have_none(tiny_llama: Path) -> None:
    for name in ("native", "torch"):
        with pytest.raises(ConfigError, match="fp8 but only Triton's kernels read it: use --attention-backend triton"):
            LLM(str(tiny_llama), attention_backend=name, **OPTIONS)


def refused(config: Any, path: Path, message: str) -> None:
    config.save_pretrained(path)
    with pytest.raises(ConfigError, match=message):
        Worker(EngineConfig.from_options(str(path), load_format="dummy", attention_backend="triton", **OPTIONS))


@pytest.mark.usefixtures("plain_attention")
def test_latents_have_none(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
        first_k_dense_replace=1, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    refused(config, tmp_path, "fp8 but the model caches latents")


def test_states_have_none(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    config.architectures = ["MambaForCausalLM"]
    refused(config, tmp_path, "fp8 but the model is served on rung state, and keeps its own")


def test_unknown_types_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        LLM(str(tiny_llama), kv_cache_dtype="int8")

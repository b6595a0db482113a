"""Greedy tokens by the kernels for GPUs, interpreted, are those of Hugging Face `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.zoo.architectures import LATENT
from tests.zoo.builder import build
from tests.zoo.served import Architecture
from tests.zoo.test_tokens import ARCHITECTURES
from transformers import AutoModelForCausalLM

from shardwright import LLM, SamplingParams

NAMES = ("llama", "gemma2", "gpt_oss", "bloom", "deepseek_v3", "llama4_text")
"""They ask for all that the kernels do: grouped heads, windows and soft-caps, sinks, ALiBi, latents, chunks."""


def test_a_prompt_in_chunks_beside_a_decode(tiny_llama: Path) -> None:
    """The interpreter is slow: the other architectures are in the sweep."""
    prompts, num_tokens = [[5, 9, 17], [*range(20, 39)]], 4
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    options = {"block_size": 4, "max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 12}
    with LLM(str(tiny_llama), attention_backend="triton", **options) as llm:
        assert llm.info.attention_backend == "triton"
        params = SamplingParams(temperature=0, max_tokens=num_tokens, min_tokens=num_tokens)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_the_reference(name: str, tmp_path: Path) -> None:
    """Prompts in chunks, then decodes together."""
    rung = "dataflow" if name == "bloom" else "interface"
    reference = build(name, ARCHITECTURES[name], tmp_path)
    architecture = Architecture(reference, rung, caches_latents=name in LATENT)
    with architecture.engine(attention_backend="triton", max_num_batched_tokens=32) as llm:
        architecture.check_all(llm)

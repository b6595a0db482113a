"""Layers that are compiled once for all give the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardwright import LLM, SamplingParams
from shardwright.adapt.compiled import compile_layers, repeated_layers
from shardwright.worker.ladder import climb
from shardwright.worker.self_check import compare_logits, stepwise_logits


def test_layers_are_the_longest_list_of_one_class() -> None:
    module = nn.Module()
    module.heads = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    module.layers = nn.ModuleList([nn.LayerNorm(2) for _ in range(3)])
    module.mixed = nn.ModuleList([nn.LayerNorm(2), nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)])
    assert repeated_layers(module) == list(module.layers)
    assert repeated_layers(nn.Linear(1, 1)) == []


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_layers_share_what_is_compiled(tiny_llama: Path) -> None:
    """The code before, within and after attention, for one token and for several, whatever the number of layers."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model = climb(
        module, num_positions=64, vocab_size=128, block_size=4, dtype=torch.float32, compute_dtype=torch.float32,
        device=torch.device("cpu"), attention_backend="torch",
    )  # fmt: skip
    expected = stepwise_logits(model, vocab_size=128, block_size=4)
    undo = compile_layers(module)
    compare_logits(expected, stepwise_logits(model, vocab_size=128, block_size=4), dtype=torch.float32)
    assert 4 <= counters["stats"]["unique_graphs"] <= 8
    undo()
    counters.clear()
    compare_logits(expected, stepwise_logits(model, vocab_size=128, block_size=4), dtype=torch.float32)
    assert not counters["stats"]


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_tokens_are_the_same(tiny_llama: Path) -> None:
    torch._dynamo.reset()
    prompts = [{"prompt_token_ids": tokens} for tokens in ([5, 9, 17], [*range(20, 39)])]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    tokens = []
    for options in ({}, {"compile_layers": True, "attention_backend": "torch"}):
        with LLM(str(tiny_llama), max_model_len=32, max_num_seqs=2, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]

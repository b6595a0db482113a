"""The starter model on real prompts: greedy tokens in float32 are those of Hugging Face `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shardwright import LLM, SamplingParams
from shardwright.models.resolve import resolve_model

pytestmark = pytest.mark.slow

STARTER = "smollm2-135m"
NUM_TOKENS = 64
MIN_GAP = 1e-3
"""Least distance between the best two logits of a step, for prompts whose answer is clear."""

MANUAL = """The kettle has three settings. Setting one keeps water warm for tea. Setting two brings it to a boil and
switches off. Setting three boils for one minute longer, which is what the manual recommends for hard water. Descale the
kettle once a month: fill it to the mark, add two spoons of citric acid, boil, wait for half an hour, and rinse twice.
Never open the lid while it boils. If the lamp blinks, the kettle was switched on without water; let it cool down.\n"""

PROMPTS = (
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "La capitale de la France est",
    "2, 4, 8, 16, 32,",
    '{"name": "Ada Lovelace", "born": 1815, "profession": "',
    "<|im_start|>user\nName three planets.<|im_end|>\n<|im_start|>assistant\n",
    "The caf\u00e9 \u2615 was closed, so we",
    MANUAL * 3 + "In short, the kettle",
)


@dataclass(frozen=True)
class References:
    """Prompts and what follows them."""

    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="module")
def references() -> References:
    path = resolve_model(STARTER)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # end-of-sequence does not end
    settings = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    outputs = []
    for text, prompt in zip(PROMPTS, prompts, strict=True):
        inputs = torch.tensor([prompt])
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
        best, second = torch.cat(output.logits).topk(2).values.unbind(-1)
        assert (best - second).min() > MIN_GAP, f"{text[:20]!r} has no clear answer: take another prompt"
        outputs.append(output.sequences[0, len(prompt) :].tolist())
    return References(prompts, outputs)


@pytest.fixture(scope="module")
def roomy() -> Iterator[LLM]:
    """An engine with memory to spare, for tests that forget what was cached before."""
    with make_engine(kv_cache_memory_bytes="512MiB") as llm:
        yield llm


def make_engine(**options: object) -> LLM:
    defaults: dict[str, object] = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8}
    return LLM(STARTER, **(defaults | options))


def check(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for output, tokens in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == tokens
    assert llm.stats.num_free_blocks == llm.stats.num_blocks


def test_alone(roomy: LLM, references: References) -> None:
    for prompt, output in zip(references.prompts, references.outputs, strict=True):
        roomy.reset_prefix_cache()
        check(roomy, [prompt], [output])


def test_batched(roomy: LLM, references: References) -> None:
    roomy.reset_prefix_cache()
    check(roomy, references.prompts, references.outputs)


def test_prefix_hits(roomy: LLM, references: References) -> None:
    roomy.reset_prefix_cache()
    check(roomy, references.prompts, references.outputs)
    before = roomy.stats.num_prefix_hit_tokens
    check(roomy, references.prompts, references.outputs)
    assert roomy.stats.num_prefix_hit_tokens - before > len(references.prompts[-1]) - 2 * roomy.info.block_size


def test_chunked(references: References) -> None:
    with make_engine(max_num_batched_tokens=48, kv_cache_memory_bytes="512MiB") as llm:
        check(llm, references.prompts, references.outputs)


def test_preempted(roomy: LLM, references: References) -> None:
    block_size, longest = 4, max(map(len, references.prompts)) + NUM_TOKENS
    bytes_per_token = roomy.info.kv_cache_bytes // (roomy.info.num_blocks + 1) // roomy.info.block_size
    budget = bytes_per_token * block_size * (longest // block_size + 2)
    options = {"max_model_len": longest, "max_num_batched_tokens": 256, "block_size": block_size}
    with make_engine(kv_cache_memory_bytes=budget, **options) as llm:
        check(llm, references.prompts, references.outputs)
        assert llm.stats.num_preemptions > 0

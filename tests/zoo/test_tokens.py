"""The engine's promise: greedy tokens are those of Hugging Face `generate`, whatever happens around a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from tests.zoo.architectures import FULL, MIXED, QUICK, SLIDING
from tests.zoo.builder import NUM_TOKENS, PROMPT_LENGTHS, Reference, build

from shardwright import LLM, SamplingParams

ARCHITECTURES = FULL | SLIDING | MIXED
BLOCK_SIZE = 4
MAX_MODEL_LEN = max(PROMPT_LENGTHS) + NUM_TOKENS


@dataclass(frozen=True)
class Architecture:
    """A model on disk, and what it shall say."""

    reference: Reference

    @contextmanager
    def engine(self, **options: object) -> Iterator[LLM]:
        """A float32 engine; at its end no block may be held."""
        fixed = {"dtype": "float32", "block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4}
        with LLM(str(self.reference.path), **(fixed | options)) as llm:
            assert llm.info.attention_rung == "interface", llm.info.attention_reason
            yield llm
            assert llm.stats.num_free_blocks == llm.stats.num_blocks

    def check(self, llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected

    def check_all(self, llm: LLM) -> None:
        self.check(llm, self.reference.prompts, self.reference.outputs)


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES],
)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = tmp_path_factory.mktemp("zoo") / request.param
    return Architecture(build(request.param, ARCHITECTURES[request.param], directory))


def test_alone(architecture: Architecture) -> None:
    with architecture.engine(enable_prefix_caching=False) as llm:
        for prompt, output in zip(architecture.reference.prompts, architecture.reference.outputs, strict=True):
            architecture.check(llm, [prompt], [output])


def test_batched(architecture: Architecture) -> None:
    with architecture.engine() as llm:
        architecture.check_all(llm)


def test_chunked(architecture: Architecture) -> None:
    with architecture.engine(max_num_batched_tokens=7) as llm:
        architecture.check_all(llm)
        assert llm.stats.num_steps > sum(PROMPT_LENGTHS) / 7


def test_preempted(architecture: Architecture) -> None:
    """Blocks for one sequence at full length only, and no more tokens a step than a prompt's chunk."""
    with architecture.engine(max_num_batched_tokens=8) as llm:
        bytes_per_block = llm.info.kv_cache_bytes // (llm.info.num_blocks + 1)
        blocks_per_sequence = llm.info.num_blocks // llm.info.max_num_seqs
    budget = bytes_per_block * (blocks_per_sequence + 1)
    order = (0, 1, 0, 1, 2, 3)  # short prompts start together and outgrow the blocks
    prompts = [architecture.reference.prompts[i] for i in order]
    outputs = [architecture.reference.outputs[i] for i in order]
    with architecture.engine(
        max_num_batched_tokens=8, kv_cache_memory_bytes=budget, enable_prefix_caching=False
    ) as llm:
        architecture.check(llm, prompts, outputs)
        assert llm.stats.num_preemptions > 0


def test_prefix_hits(architecture: Architecture) -> None:
    with architecture.engine() as llm:
        architecture.check_all(llm)
        before = llm.stats.num_prefix_hit_tokens
        architecture.check_all(llm)
        assert llm.stats.num_prefix_hit_tokens > before

"""Models run from their authors' code, as it is, and say what full forward passes of that code say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from tests.custom.builder import MODELS, NUM_TOKENS, PROMPT_LENGTHS, Reference, build
from tests.custom.expected import LATENT, QUICK, REASONS, RUNGS

from shardwright import LLM, SamplingParams

MAX_MODEL_LEN = max(PROMPT_LENGTHS) + NUM_TOKENS


@dataclass(frozen=True)
class Custom:
    """A model on disk, and what it shall say."""

    name: str
    reference: Reference

    @contextmanager
    def engine(self, **options: object) -> Iterator[LLM]:
        """A float32 engine on the rung that it shall be; at its end no block may be held."""
        fixed = {"dtype": "float32", "block_size": 4, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4}
        with LLM(str(self.reference.path), trust_remote_code=True, **(fixed | options)) as llm:
            assert llm.info.attention_rung == RUNGS[self.name], llm.info.attention_reason
            assert REASONS.get(self.name, "") in llm.info.attention_reason
            assert ("cache one latent of" in llm.info.attention_reason) == (self.name in LATENT)
            yield llm
            assert llm.stats.num_free_blocks == llm.stats.num_blocks

    def check(self, llm: LLM, indices: list[int]) -> None:
        """Generate for some of the prompts, together."""
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        prompts = [{"prompt_token_ids": self.reference.prompts[i]} for i in indices]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [self.reference.outputs[i] for i in indices]


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(RUNGS)],
)
def custom(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Custom:
    directory = tmp_path_factory.mktemp("custom") / request.param
    return Custom(request.param, build(MODELS / request.param, directory))


@pytest.mark.sweep
def test_alone(custom: Custom) -> None:
    with custom.engine(enable_prefix_caching=False) as llm:
        for i in range(len(PROMPT_LENGTHS)):
            custom.check(llm, [i])


def test_batched(custom: Custom) -> None:
    with custom.engine() as llm:
        custom.check(llm, [0, 1, 2, 3])
        custom.check(llm, [3, 2, 1, 0])  # with their own prefixes cached


def test_chunked(custom: Custom) -> None:
    with custom.engine(max_num_batched_tokens=7) as llm:
        custom.check(llm, [0, 1, 2, 3])
        assert llm.stats.num_steps > sum(PROMPT_LENGTHS) / 7 or not llm.info.takes_chunks


def test_preempted(custom: Custom) -> None:
    """With blocks for one sequence at full length: short prompts start together, and outgrow them."""
    with custom.engine(max_num_batched_tokens=8) as llm:
        bytes_per_block = llm.info.kv_cache_bytes // (llm.info.num_blocks + 1)
        blocks_per_sequence = llm.info.num_blocks // llm.info.max_num_seqs
    budget = bytes_per_block * (blocks_per_sequence + 1)
    with custom.engine(max_num_batched_tokens=8, kv_cache_memory_bytes=budget, enable_prefix_caching=False) as llm:
        custom.check(llm, [0, 1, 0, 1, 2, 3])
        assert llm.stats.num_preemptions > 0


def test_every_modeling_file_is_served() -> None:
    assert {path.name for path in MODELS.iterdir()} == {*RUNGS, "rare_path"}

"""The engine's promise: greedy tokens are those of Hugging Face `generate`, whatever happens around a request."""

from __future__ import annotations

import pytest
from tests.zoo.architectures import FULL, LATENT, MIXED, OVER_PAGES, OWN_ATTENTION, QUICK, SLIDING
from tests.zoo.builder import PROMPT_LENGTHS, build
from tests.zoo.served import Architecture

ARCHITECTURES = FULL | SLIDING | MIXED | OWN_ATTENTION | OVER_PAGES


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES],
)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = tmp_path_factory.mktemp("zoo") / request.param
    rung = "dataflow" if request.param in OWN_ATTENTION else "interface"
    reference = build(request.param, ARCHITECTURES[request.param], directory)
    return Architecture(
        reference, rung, caches_latents=request.param in LATENT, runs_over_pages=request.param in OVER_PAGES
    )


@pytest.mark.sweep
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

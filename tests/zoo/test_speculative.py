"""Tokens guessed ahead change nothing: greedy tokens are those of Hugging Face `generate`, whatever is guessed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.zoo.architectures import FULL, LATENT, MIXED, SLIDING, STATES
from tests.zoo.builder import build
from tests.zoo.served import BLOCK_SIZE, Architecture
from transformers import AutoModelForCausalLM

from shardwright import LLM, SamplingParams
from shardwright.errors import ConfigError
from shardwright.kernels.jit import native_library
from shardwright.outputs import CompletionOutput

ARCHITECTURES = {
    "gemma2": [], "deepseek_v3": [pytest.mark.slow], "gpt2": [pytest.mark.sweep], "llama": [pytest.mark.sweep],
    "mixtral": [pytest.mark.sweep],
}  # fmt: skip
ALL_GUESS = {"speculative_step_tokens": 64, "num_speculative_tokens": 3}
"""As many as a batch of these tests has requests."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks) for name, marks in ARCHITECTURES.items()])
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = tmp_path_factory.mktemp("speculative") / request.param
    reference = build(request.param, (FULL | SLIDING | MIXED)[request.param], directory)
    return Architecture(reference, caches_latents=request.param in LATENT)


@pytest.fixture(scope="module")
def noisy(architecture: Architecture) -> Path:
    """The same model with some noise in its weights: what it proposes is often right, and often wrong."""
    path = architecture.reference.path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(noisy := path.parent / "noisy")
    return noisy


def test_by_prompt_lookup(architecture: Architecture) -> None:
    with architecture.engine(speculative_method="ngram", prompt_lookup_min=1, **ALL_GUESS) as llm:
        architecture.check_all(llm)
        assert 0 < llm.stats.num_proposed_tokens > llm.stats.num_accepted_tokens


def test_by_a_draft_model(architecture: Architecture, noisy: Path) -> None:
    with architecture.engine(speculative_model=str(noisy), **ALL_GUESS) as llm:
        for _ in range(2):  # then with prefixes that both have in their blocks
            architecture.check_all(llm)
        assert 0 < llm.stats.num_accepted_tokens < llm.stats.num_proposed_tokens
        assert llm.stats.num_prefix_hit_tokens > 0


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_in_chunks_and_with_preemption(architecture: Architecture, noisy: Path, method: str) -> None:
    guesses = {"speculative_model": str(noisy)} if method == "draft" else {"speculative_method": "ngram"}
    options = ALL_GUESS | guesses | {"max_num_batched_tokens": 12, "prompt_lookup_min": 1}
    with architecture.engine(**options) as llm:
        bytes_per_block = llm.info.kv_cache_bytes // (llm.info.num_blocks + 1)
        blocks_per_sequence = llm.info.num_blocks // llm.info.max_num_seqs
    budget = bytes_per_block * (blocks_per_sequence + 1)
    order = (0, 1, 0, 1, 2, 3)  # short prompts start together and outgrow the blocks
    prompts = [architecture.reference.prompts[i] for i in order]
    outputs = [architecture.reference.outputs[i] for i in order]
    with architecture.engine(**options, kv_cache_memory_bytes=budget, enable_prefix_caching=False) as llm:
        architecture.check(llm, prompts, outputs)
        assert llm.stats.num_preemptions > 0
        assert llm.stats.num_proposed_tokens > 0


def request_of_any_kind(chance: random.Random) -> tuple[list[int], SamplingParams]:
    max_tokens = chance.randrange(1, 24)
    params = SamplingParams(
        temperature=chance.choice([0.0, 0.7, 1.5]),
        seed=chance.randrange(1000),
        max_tokens=max_tokens,
        min_tokens=chance.choice([0, min(5, max_tokens)]),
        top_p=chance.choice([1.0, 0.9]),
        top_k=chance.choice([0, 20]),
        min_p=chance.choice([0.0, 0.02]),
        repetition_penalty=chance.choice([1.0, 1.3]),
        frequency_penalty=chance.choice([0.0, 0.5]),
        logit_bias=chance.choice([None, {40: 3.0}]),
        logprobs=chance.choice([None, 0, 2]),
        stop_token_ids=chance.choice([None, list(range(30, 60))]),
        stop=chance.choice([None, ["a", "Q"]]),
    )
    return [chance.randrange(4, 20) for _ in range(chance.randrange(1, 36))], params


def test_requests_of_all_kinds_get_what_they_get_without_guesses(architecture: Architecture, noisy: Path) -> None:
    chance = random.Random(1)
    prompts, params = zip(*(request_of_any_kind(chance) for _ in range(16)), strict=True)

    def run(**options: object) -> list[CompletionOutput]:
        with architecture.engine(**options) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            assert (llm.stats.num_proposed_tokens > 0) == bool(options)
        return [output.outputs[0] for output in outputs]

    def told(output: CompletionOutput) -> tuple[object, ...]:
        return output.token_ids, output.text, output.finish_reason, output.stop_reason

    expected = run()
    guesses = {
        "ngram": {"speculative_method": "ngram", "prompt_lookup_min": 1},
        "draft": {"speculative_model": str(noisy)},
    }
    for method in guesses.values():
        for found, wanted in zip(run(**ALL_GUESS, **method), expected, strict=True):
            assert told(found) == told(wanted)
            for position, other in zip(found.logprobs or [], wanted.logprobs or [], strict=True):
                assert [entry.logprob for entry in position.values()] == pytest.approx(
                    [entry.logprob for entry in other.values()], abs=1e-4
                )


@pytest.mark.skipif(native_library() is None, reason="no C++ compiler")
def test_steps_with_guesses_are_repeated_like_others(tiny_llama: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(tiny_llama), max_num_seqs=1, kv_cache_memory_bytes="16MiB", speculative_model=str(tiny_llama)) as llm:
        worker = llm._core.executor._worker  # type: ignore[union-attr]
        calls: list[int] = []
        for model in (worker._model, worker._draft.model):
            assert model._program is not None
            run = model.served.forward
            model.served.forward = lambda inputs, *rest, run=run: (
                calls.append(len(inputs.input_ids)),
                run(inputs, *rest),
            )[1]
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
        assert llm.stats.num_accepted_tokens > 0
    assert calls == []


@pytest.mark.slow
def test_states_are_not_guessed_ahead_of(tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = build("minimax", STATES["minimax"], tmp_path / "minimax")
    served = Architecture(reference, rung="state")
    with served.engine(speculative_method="ngram", prompt_lookup_min=1) as llm:
        served.check_all(llm)
        assert llm.stats.num_proposed_tokens == 0
    assert "no tokens are guessed ahead: on rung 'state'" in caplog.text
    with pytest.raises(ConfigError, match="rung state: what its wrong proposals leave behind cannot be taken back"):
        LLM(str(tiny_llama), dtype="float32", block_size=BLOCK_SIZE, speculative_model=str(reference.path))

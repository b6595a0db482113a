"""Models with states give Hugging Face's greedy tokens, wherever their code keeps the states."""

from __future__ import annotations

import pytest
from tests.zoo.architectures import STATES
from tests.zoo.builder import build
from tests.zoo.served import Architecture


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in STATES])
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = tmp_path_factory.mktemp("states") / request.param
    reference = build(request.param, STATES[request.param], directory)
    return Architecture(reference, rung="state", runs_over_pages=request.param in ("inkling2_text", "qwen4_exp_text"))


def test_alone_then_batched(architecture: Architecture) -> None:
    with architecture.engine() as llm:
        for prompt, output in zip(architecture.reference.prompts, architecture.reference.outputs, strict=True):
            architecture.check(llm, [prompt], [output])
        architecture.check_all(llm)


def test_chunked(architecture: Architecture) -> None:
    with architecture.engine(max_num_batched_tokens=7) as llm:
        architecture.check_all(llm)


def test_planned_ahead(architecture: Architecture) -> None:
    with architecture.engine(async_scheduling=True, max_num_batched_tokens=7, max_num_seqs=2) as llm:
        architecture.check_all(llm)


def test_slots_taken_in_turns(architecture: Architecture) -> None:
    """More requests than slots: what one leaves behind must not reach the next."""
    with architecture.engine(max_num_seqs=2) as llm:
        architecture.check_all(llm)
        architecture.check_all(llm)

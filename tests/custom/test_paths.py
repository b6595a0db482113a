"""Code that leaves the path on which it was traced is served all the same, from then on without its cache."""

from __future__ import annotations

import logging

import pytest
from tests.custom.builder import MODELS, NUM_TOKENS, build

from shardwright import LLM, SamplingParams


@pytest.mark.slow
def test_a_path_that_no_trial_showed(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    reference = build(MODELS / "rare_path", tmp_path_factory.mktemp("custom") / "rare_path")
    prompts = [{"prompt_token_ids": prompt} for prompt in reference.prompts]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(reference.path), trust_remote_code=True, dtype="float32", max_model_len=64) as llm:
        assert llm.info.attention_rung == "sdpa"
        outputs = llm.generate(prompts[:2], params, use_tqdm=False)
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            outputs += llm.generate(prompts[2:], params, use_tqdm=False)
        assert "from now on every step computes whole sequences, one at a time: its code attends more" in caplog.text
        outputs += llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == 2 * reference.outputs

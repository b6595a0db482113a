"""Prompts longer than what is watched of a model's code at load."""

from __future__ import annotations

import pytest
from tests.custom.builder import MODELS, NUM_TOKENS, build, generate, prompt
from tests.custom.expected import RUNGS
from transformers import AutoModelForCausalLM

from shardwright import LLM, SamplingParams
from shardwright.adapt.intercepted_model import LONG_TRACE

LENGTHS = (LONG_TRACE + 40, 9)


@pytest.mark.parametrize("name", ["growing_tables"])
def test_far_prompts(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = build(MODELS / name, tmp_path_factory.mktemp("custom") / name).path
    plain = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [prompt(length) for length in LENGTHS]
    with LLM(str(path), trust_remote_code=True, dtype="float32", max_model_len=1024, max_num_seqs=2) as llm:
        assert llm.info.attention_rung == RUNGS[name], llm.info.attention_reason
        outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [generate(plain, tokens)[0] for tokens in prompts]

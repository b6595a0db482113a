"""vLLM as one of the engines compared, in the environment of its own launcher."""

from __future__ import annotations

from typing import Any

import vllm
from child import serve


class Vllm:
    """vLLM's `LLM`, with room for the largest workload."""

    def __init__(self, model: str, dtype: str) -> None:
        self.llm = vllm.LLM(
            model=model, dtype=dtype, max_model_len=2048, max_num_seqs=64, seed=0, trust_remote_code=True
        )

    def describe(self) -> dict[str, Any]:
        return {"version": vllm.__version__}

    def prepare(self, prompts: list[list[int]], output_tokens: int) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, prompts: list[list[int]], output_tokens: int) -> int:
        params = vllm.SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    serve(Vllm)

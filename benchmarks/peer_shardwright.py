"""shardwright as one of the engines compared."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec
from child import serve

from shardwright.llm import LLM
from shardwright.sampling_params import SamplingParams


class Shardwright:
    """An engine in this process."""

    def __init__(self, model: str, dtype: str, quantization: str = "none") -> None:
        self.llm = LLM(model, dtype=dtype, quantization=quantization)

    def describe(self) -> dict[str, Any]:
        return {"version": importlib.metadata.version("shardwright"), "info": msgspec.to_builtins(self.llm.info)}

    def prepare(self, prompts: list[list[int]], output_tokens: int) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, prompts: list[list[int]], output_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    serve(Shardwright)

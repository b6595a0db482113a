"""Hugging Face `generate` as one of the engines compared: one static batch, without padding."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from child import serve


class HuggingFace:
    """A causal LM and its cache, in this process."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), trust_remote_code=True
        )
        self.model.eval()

    def describe(self) -> dict[str, Any]:
        return {"version": transformers.__version__}

    def prepare(self, prompts: list[list[int]], output_tokens: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], output_tokens: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            outputs = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return int(outputs.shape[0] * (outputs.shape[1] - ids.shape[1]))


if __name__ == "__main__":
    serve(HuggingFace)

"""Generate from a list of prompts, in this process.

python examples/offline.py [MODEL]
"""

from __future__ import annotations

import sys

from shardwright import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time, a lighthouse keeper"]


def main(model: str) -> None:
    """Complete three prompts greedily, then answer a question."""
    with LLM(model) as llm:
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

        messages = [{"role": "user", "content": "Name three colours."}]
        (answer,) = llm.chat(messages, SamplingParams(temperature=0.7, seed=1, max_tokens=64))
        print(f"{answer.outputs[0].text!r} ({answer.outputs[0].finish_reason})")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["smollm2-135m"])

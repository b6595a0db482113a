"""Stream several completions at once from one engine, as a service of your own would.

python examples/async_stream.py [MODEL]
"""

from __future__ import annotations

import asyncio
import sys

from shardwright import AsyncLLM, SamplingParams

PROMPTS = ["The sea is", "The desert is", "The forest is"]


async def tell(engine: AsyncLLM, prompt: str) -> None:
    """Print a line for every piece of text that arrives."""
    params = SamplingParams(temperature=0, max_tokens=16)
    async for output in engine.generate(prompt, params, stream="delta"):
        for piece in output.outputs:
            print(f"{prompt!r}: {piece.text!r}")


async def main(model: str) -> None:
    """Run all prompts together; leaving the loop early would abort the request and free its memory."""
    engine = AsyncLLM(model)
    try:
        await asyncio.gather(*(tell(engine, prompt) for prompt in PROMPTS))
    finally:
        engine.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["smollm2-135m"]))

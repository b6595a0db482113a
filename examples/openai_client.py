"""Talk to a running server with OpenAI's client.

shardwright serve smollm2-135m
python examples/openai_client.py [URL]
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str) -> None:
    """Stream an answer, then complete a prompt with log-probabilities."""
    client = OpenAI(base_url=url, api_key="unused")  # the key counts if the server has --api-key
    model = client.models.list().data[0].id

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue? One sentence."}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    completion = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=2
    )
    choice = completion.choices[0]
    print(repr(choice.text), choice.logprobs and choice.logprobs.token_logprobs)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["http://127.0.0.1:8000/v1"])

"""What quantized weights cost in precision: perplexity of a text, as the model is built and in 8 and 4 bits.

    python benchmarks/quantization.py [MODEL] [--text FILE] [--group-size 32 --group-size 64] [--dtype bfloat16]

The text is read through the engine, in windows that begin with the tokens before them, so what is measured is what is
served. Beside the perplexity stands how often the most likely next token is the one of the weights as they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright import LLM, SamplingParams

TEXT = Path(__file__).parent / "texts" / "harbour.txt"
WINDOW = 512
"""Tokens that are read at once."""
OVERLAP = 128
"""Those of them that are only read, being scored in the window before."""


@dataclass(frozen=True)
class Reading:
    """What a model makes of a text."""

    perplexity: float
    best: list[int]
    """The most likely token at each place."""
    weight_bytes: int


def read(model: str, text: str, **options: object) -> Reading:
    """Score a text with a fresh engine."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    fixed = {"max_model_len": WINDOW + 1, "enable_prefix_caching": False, "max_num_seqs": 1}
    with LLM(model, **(fixed | options)) as llm:
        token_ids = llm.tokenizer.encode(text)
        total, best = 0.0, list[int]()
        for start in range(0, len(token_ids) - OVERLAP, WINDOW - OVERLAP):
            window = token_ids[start : start + WINDOW]
            [output] = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
            scores = output.prompt_logprobs or []
            first = OVERLAP if start else 1
            for token_id, score in list(zip(window, scores, strict=True))[first:]:
                assert score is not None
                total -= score[token_id].logprob
                best.append(max(score, key=lambda other: score[other].logprob))
        return Reading(math.exp(total / len(best)), best, llm.info.weight_bytes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Perplexity of a text, quantized and not.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--group-size", type=int, action="append", help="default: 32, 64 and 128")
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args(arguments)
    text = given.text.read_text(encoding="utf-8")
    plain = read(given.model, text, dtype=given.dtype)
    print(f"{given.model}, {given.text.name}, {len(plain.best)} tokens")
    print("| weights | MiB | perplexity | | same best token |")
    print("|---|---|---|---|---|")
    print(f"| as they are | {plain.weight_bytes / 2**20:.0f} | {plain.perplexity:.3f} | | |", flush=True)
    for kind in ("int8", "int4"):
        for size in given.group_size or (32, 64, 128):
            found = read(given.model, text, dtype=given.dtype, quantization=kind, quantization_group_size=size)
            more = 100 * (found.perplexity / plain.perplexity - 1)
            same = sum(a == b for a, b in zip(found.best, plain.best, strict=True)) / len(plain.best)
            print(
                f"| {kind} in groups of {size} | {found.weight_bytes / 2**20:.0f} | {found.perplexity:.3f} "
                f"| {more:+.2f} % | {100 * same:.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()

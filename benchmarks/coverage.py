"""Which architectures are served, on which rung, with which tokens: one table over a folder of model directories.

    python benchmarks/coverage.py FOLDER [FOLDER ...] [--output docs/coverage.md]

Every model directory holds a reference.json beside its weights: prompts as token ids, and the greedy tokens that
Hugging Face gives in float32 (`prompts[].prompt_token_ids`, `prompts[].output_token_ids`, and `hf_cache_consistent`:
false where Hugging Face's own cached generation differs from its full forward passes, so that no engine can be judged
by it). Each model runs all its prompts together, then in chunks of 7 tokens. Exit code 1 if a model with a consistent
reference is refused or gives other tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

MOST_REASON = 160


@dataclass(frozen=True, slots=True)
class Row:
    """One model."""

    name: str
    family: str
    rung: str
    tokens: str
    reason: str
    is_failure: bool


def main() -> int:
    """Run all models and write the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, help="Markdown file to write; default: standard output")
    args = parser.parse_args()
    quiet()
    models = [path.parent for folder in args.folders for path in sorted(folder.glob("*/reference.json"))]
    if not models:
        parser.error(f"no model directories with a reference.json in {', '.join(map(str, args.folders))}")
    rows = [judge(path) for path in tqdm(models, desc="models", dynamic_ncols=True)]
    text = table(rows)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)
    return 1 if any(row.is_failure for row in rows) else 0


def quiet() -> None:
    """Leave the terminal to the progress bar."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("shardwright").setLevel(logging.ERROR)


def judge(path: Path) -> Row:
    """Serve one model both ways and compare."""
    reference = json.loads((path / "reference.json").read_text())
    name, family = path.name, reference.get("family") or "other"
    is_consistent = reference.get("hf_cache_consistent", True)
    try:
        rung, reason, equal = run(path, reference)
    except Exception as exc:  # one model that fails must not hide the others
        return Row(name, family, "-", "refused", f"{type(exc).__name__}: {exc}", is_consistent)
    tokens = "equal" if all(equal) else "differ" if is_consistent else "no consistent reference"
    return Row(name, family, rung, tokens, reason, is_consistent and not all(equal))


def run(path: Path, reference: dict) -> tuple[str, str, list[bool]]:
    """Rung, its reason, and whether the tokens are equal: all prompts together, and in chunks."""
    from shardwright import LLM, SamplingParams

    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in reference["prompts"]]
    expected = [row["output_token_ids"] for row in reference["prompts"]]
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    equal, info = [], None
    for options in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 4, "block_size": 4}):
        with LLM(str(path), dtype="float32", trust_remote_code=True, kv_cache_memory_bytes="64MiB", **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            equal.append([output.outputs[0].token_ids for output in outputs] == expected)
            info = llm.info
    assert info is not None
    return info.attention_rung, info.attention_reason, equal


def table(rows: list[Row]) -> str:
    """The Markdown document."""
    import torch
    import transformers

    judged = [row for row in rows if row.tokens != "no consistent reference"]
    rungs = Counter(row.rung for row in rows)
    lines = [
        "# Coverage",
        "",
        f"Written by `benchmarks/coverage.py` on {datetime.date.today()}, in float32, with Transformers "
        f"{transformers.__version__} and torch {torch.__version__}.",
        "Tokens are compared with Hugging Face's greedy ones: all prompts batched, and prefilled in chunks of 7.",
        "",
        f"{sum(row.tokens == 'equal' for row in judged)} of {len(judged)} models with a consistent reference give "
        f"equal tokens. Rungs: {', '.join(f'{rung} {count}' for rung, count in rungs.most_common())}.",
        "",
        "| model | family | rung | tokens | why this rung |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        reason = row.reason.replace("|", "\\|").replace("\n", " ")
        reason = reason if len(reason) <= MOST_REASON else reason[: MOST_REASON - 1] + "…"
        lines.append(f"| {row.name} | {row.family} | {row.rung} | {row.tokens} | {reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

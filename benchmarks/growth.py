"""How cost grows: with requests, with context, with the model's size; a JSON document, a table and a plot.

    python benchmarks/growth.py MODEL                     # requests and context of MODEL, and sizes of made-up Llamas
    python benchmarks/growth.py MODEL --part requests     # one of them
    python benchmarks/growth.py MODEL --quick             # small numbers, to see that it works

* requests: 1 to 64 sequences of 32 tokens that decode together; output tokens per second
* context: one sequence of 128 to 8192 tokens; how long its prompt takes, and then one decode step
* size: Llamas of 135M to 1B parameters with random weights; decode at one request, and a prompt of 512 tokens

Each measurement stands beside its bound (`shardwright.bench.bound`), which knows nothing of attention: with long
contexts it is out of reach. The plot needs matplotlib: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from growth_plot import draw
from report import table
from tqdm import tqdm

from shardwright.bench.bound import Weights, step_seconds
from shardwright.bench.machine import Machine, measure_machine
from shardwright.bench.run import Measurement, measure, warm_up
from shardwright.bench.workloads import Workload, uniform
from shardwright.llm import LLM

HERE = Path(__file__).parent
PARTS = ("requests", "context", "size")

REQUESTS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = {
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
    "600M": (1280, 3584, 28, 20, 5),
    "1B": (2048, 5632, 22, 32, 4),
}
"""Width, width of the MLP, layers, query heads, KV heads. The first two are SmolLM2's, the last TinyLlama's; all have
49152 words and a tied head."""
QUICK_SIZES = {"tiny": (64, 96, 2, 4, 2)}
SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SIZE_PROMPT = 512
DECODE_TOKENS = 32


Row: TypeAlias = tuple[dict[str, Any], Callable[[Machine], dict[str, Any]]]
"""What was measured, and its bounds on a machine: how fast that is, is known best when all is measured."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, for requests and context")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measurement; the fastest counts")
    parser.add_argument("--quick", action="store_true", help="small numbers, once each: to see that it works")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON document and table")
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs/images/growth.svg")
    args = parser.parse_args(arguments)
    repeat = 1 if args.quick else args.repeat
    parts, machine = args.part or PARTS, measure_machine()
    measured: dict[str, list[Row]] = {}
    if "requests" in parts or "context" in parts:
        with LLM(args.model, dtype=args.dtype) as llm:
            warm_up(llm)
            if "requests" in parts:
                counts = REQUESTS[:2] if args.quick else REQUESTS
                measured["requests"] = over_requests(llm, counts, repeat=repeat)
                machine = machine.at_best(measure_machine())  # it may have been busy before
            if "context" in parts:
                lengths = CONTEXTS[:1] if args.quick else CONTEXTS
                measured["context"] = over_context(llm, lengths, repeat=repeat)
    if "size" in parts:
        sizes = QUICK_SIZES if args.quick else SIZES
        measured["size"] = over_size(sizes, args.dtype, repeat=repeat)
    machine = machine.at_best(measure_machine())
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": args.model,
        "dtype": args.dtype,
        "machine": machine.as_json(),
        **{part: [row | bounds(machine) for row, bounds in rows] for part, rows in measured.items()},
    }
    write(document, args.results, args.image)


def best(llm: LLM, workload: Workload, *, repeat: int) -> Measurement:
    """The fastest of several runs."""
    job = workload.for_vocabulary(llm.info.vocab_size)
    return min((measure(llm, job) for _ in range(repeat)), key=lambda run: run.elapsed_s)


def over_requests(llm: LLM, counts: Sequence[int], *, repeat: int) -> list[Row]:
    """Output tokens per second of so many sequences that decode together."""
    weights = Weights.of_engine(llm.info)

    def row(count: int) -> Row:
        step_s = decode_step_s(best(llm, uniform("growth", count, 32, DECODE_TOKENS), repeat=repeat))
        return (
            {"requests": count, "tokens_per_s": round(count / step_s, 2)},
            lambda machine: {"bound": round(count / step_seconds(count, weights, machine), 2)},
        )

    return [row(count) for count in tqdm(counts, desc="requests")]


def over_context(llm: LLM, lengths: Sequence[int], *, repeat: int) -> list[Row]:
    """Seconds of a prompt, and of a decode step after it. The longest leaves room for what is decoded."""
    weights = Weights.of_engine(llm.info)

    def row(length: int) -> Row:
        run = best(llm, uniform("growth", 1, length, DECODE_TOKENS), repeat=repeat)
        return (
            {"context": length, "prefill_s": round(run.ttft_s[0], 4), "step_s": round(decode_step_s(run), 5)},
            lambda machine: {
                "prefill_bound_s": round(step_seconds(length, weights, machine), 4),
                "step_bound_s": round(step_seconds(1, weights, machine), 5),
            },
        )

    return [row(min(length, llm.info.max_model_len - DECODE_TOKENS)) for length in tqdm(lengths, desc="context")]


def over_size(sizes: dict[str, tuple[int, ...]], dtype: str, *, repeat: int) -> list[Row]:
    """Decode at one request and the prompt of Llamas with random weights."""

    def row(name: str, shape: tuple[int, ...]) -> Row:
        with tempfile.TemporaryDirectory(prefix="growth-") as folder:
            write_config(Path(folder), shape)
            options = {"dtype": dtype, "load_format": "dummy", "max_model_len": 1024, "kv_cache_memory_bytes": 2**29}
            with LLM(folder, **options) as llm:
                warm_up(llm)
                run = best(llm, uniform("growth", 1, SIZE_PROMPT, DECODE_TOKENS), repeat=repeat)
                weights = Weights.of_engine(llm.info)
        return (
            {
                "size": name,
                "parameters": weights.num_parameters,
                "tokens_per_s": round(1 / decode_step_s(run), 2),
                "prefill_tokens_per_s": round(SIZE_PROMPT / run.ttft_s[0], 1),
            },
            lambda machine: {
                "bound": round(1 / step_seconds(1, weights, machine), 2),
                "prefill_bound": round(SIZE_PROMPT / step_seconds(SIZE_PROMPT, weights, machine), 1),
            },
        )

    return [row(name, shape) for name, shape in tqdm(sizes.items(), desc="sizes")]


def decode_step_s(run: Measurement) -> float:
    """Seconds of a decode step: the median, since the first is longer where prompts end at different moments."""
    return sorted(run.itl_s)[len(run.itl_s) // 2]


def write_config(folder: Path, shape: tuple[int, ...]) -> None:
    """A Llama without weights and without a tokenizer."""
    from transformers import LlamaConfig

    words = {"vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    config = LlamaConfig(**words, **dict(zip(SHAPE_FIELDS, shape, strict=True)), architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)


def write(document: dict[str, Any], results: Path, image: Path) -> None:
    """The document and its tables into `results`, the plot into `image`; the tables on stdout too."""
    results.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-growth-{Path(document['model']).name}-{document['dtype']}"
    text = as_markdown(document)
    (results / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    (results / f"{stem}.md").write_text(text + "\n")
    print(text)
    try:
        draw(document, image)
    except ModuleNotFoundError as exc:
        print(f"no plot: {exc.name} is missing: pip install -r benchmarks/requirements.txt", file=sys.stderr)


def as_markdown(document: dict[str, Any]) -> str:
    """One table for each part that was measured."""
    machine = document["machine"]
    lines = [
        f"# Growth: {document['model']}, {document['dtype']}, {document['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; measured: reads"
        f" {machine['read_gb_per_s']} GB/s, multiplies {machine['gemm_gflop_per_s']} GFLOP/s"
        f" ({machine['gemm_dtype']}).",
    ]
    if rows := document.get("requests"):
        cells = [
            [str(r["requests"]), f"{r['tokens_per_s']:.1f}", f"{r['bound']:.1f}", share(r["tokens_per_s"], r["bound"])]
            for r in rows
        ]
        lines += ["", *table(["requests", "tokens/s", "bound", "of bound"], cells)]
    if rows := document.get("context"):
        cells = [
            [
                str(r["context"]),
                f"{r['prefill_s'] * 1000:.0f}",
                share(r["prefill_bound_s"], r["prefill_s"]),
                f"{r['step_s'] * 1000:.2f}",
                share(r["step_bound_s"], r["step_s"]),
            ]
            for r in rows
        ]
        lines += ["", *table(["context", "prompt, ms", "of bound", "decode step, ms", "of bound"], cells)]
    if rows := document.get("size"):
        cells = [
            [
                r["size"],
                f"{r['tokens_per_s']:.1f}",
                share(r["tokens_per_s"], r["bound"]),
                f"{r['prefill_tokens_per_s']:.0f}",
                share(r["prefill_tokens_per_s"], r["prefill_bound"]),
            ]
            for r in rows
        ]
        lines += ["", *table(["parameters", "decode-1, tokens/s", "of bound", "prompt, tokens/s", "of bound"], cells)]
    return "\n".join(lines)


def share(part: float, whole: float) -> str:
    """A percentage."""
    return f"{part / whole:.0%}"


if __name__ == "__main__":
    main()

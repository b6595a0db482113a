"""Models with their own modeling code, grown to SmolLM2's size, beside Llamas of the same shape: are they as fast?

    python benchmarks/custom_size.py ../shared/zoo/custom

FOLDER has the model directories nanogpt, sdpa_llama and semantic_llama (config.json and modeling file; weights are made
up here). Each has a twin: Transformers' Llama with the same width, layers, heads, words and untied head. NanoGPT, whose
attention has as many key heads as queries, gets a twin with as many; its MLP of two wide matrices has as many weights
as the Llama's three. All are loaded in this process and run in turns; the best round of each counts.

On a machine with other work, `--cpu-time` under OMP_NUM_THREADS=1 still compares fairly: one thread waits for none.

Exit code 1 if one reaches less than `--at-least` of its twin's speed on some workload.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import table

from shardwright.bench.run import measure, warm_up
from shardwright.bench.workloads import WORKLOADS, Workload, uniform
from shardwright.llm import LLM

LENGTH = 1024
WIDTH, MLP, LAYERS, HEADS, KV_HEADS, WORDS = 576, 1536, 30, 9, 3, 49152
"""SmolLM2-135M's."""
SMALL = (64, 96, 2, 4, 2, 128)
"""The same for `--quick`."""


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A model directory and what stands in its config; a Llama has no directory to begin with."""

    name: str
    config: dict[str, Any]
    twin: str | None = None


def grown(width: int, mlp: int, layers: int, heads: int, kv_heads: int, words: int) -> list[Grown]:
    """All models of one size."""

    def llama(name: str, num_kv_heads: int) -> Grown:
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": words,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": LENGTH,
            "tie_word_embeddings": False,
        }
        return Grown(name=name, config=config)

    gpt = {"vocab_size": words, "block_size": LENGTH, "n_layer": layers, "n_head": heads, "n_embd": width}
    sdpa = {
        "vocab_size": words,
        "dim": width,
        "hidden_dim": mlp,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "max_seq_len": LENGTH,
    }
    few, many = llama("llama", kv_heads), llama("llama, all KV heads", heads)
    semantic = {key: few.config[key] for key in few.config if key not in ("model_type", "architectures")}
    del semantic["tie_word_embeddings"]
    return [
        few,
        many,
        Grown(name="sdpa_llama", config=sdpa, twin=few.name),
        Grown(name="semantic_llama", config=semantic, twin=few.name),
        Grown(name="nanogpt", config=gpt, twin=many.name),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each workload on each model")
    parser.add_argument("--at-least", type=float, default=0.9, help="share of its twin's speed that each shall reach")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time, for a busy machine")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: to see that it works")
    args = parser.parse_args(arguments)
    models = grown(*SMALL) if args.quick else grown(WIDTH, MLP, LAYERS, HEADS, KV_HEADS, WORDS)
    workloads = [WORKLOADS["decode-1"], WORKLOADS["decode-8"], uniform("prompts", 4, 512, 1, headline="total")]
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="custom-")))
        engines = {model.name: stack.enter_context(load(model, args.folder, home, args.dtype)) for model in models}
        seconds = run_all(engines, workloads, rounds=1 if args.quick else args.rounds, cpu_time=args.cpu_time)
        rungs = {name: llm.info.attention_rung for name, llm in engines.items()}
    ratios = {
        model.name: [seconds[model.twin, w.name] / seconds[model.name, w.name] for w in workloads]
        for model in models
        if model.twin is not None
    }
    rows = [
        [
            model.name,
            rungs[model.name],
            model.twin or "-",
            *(f"{w.num_headline_tokens / seconds[model.name, w.name]:.1f}" for w in workloads),
            *(f"{ratio:.2f}" for ratio in ratios.get(model.name, [1.0] * len(workloads))),
        ]
        for model in models
    ]
    names = [w.name for w in workloads]
    header = ["model", "rung", "twin", *(f"{name}, tokens/s" for name in names), *(f"{name}, ratio" for name in names)]
    print("\n".join(table(header, rows)))
    return 1 if min(min(values) for values in ratios.values()) < args.at_least and not args.quick else 0


@contextlib.contextmanager
def load(model: Grown, sources: Path, home: Path, dtype: str) -> Any:
    """The model with made-up weights, ready to run."""
    folder = home / model.name.replace(", ", "-").replace(" ", "-")
    config = model.config
    if model.twin is None:
        folder.mkdir()
    else:
        source = sources / model.name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "token*", "reference.json"))
        config = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(config))
    options = {"dtype": dtype, "load_format": "dummy", "trust_remote_code": True, "kv_cache_memory_bytes": 2**28}
    with LLM(str(folder), **options) as llm:
        warm_up(llm)
        print(f"{model.name}: {llm.info.attention_rung}, {llm.info.weight_bytes / 2**20:.0f} MiB", file=sys.stderr)
        yield llm


def run_all(
    engines: dict[str, LLM], workloads: list[Workload], *, rounds: int, cpu_time: bool
) -> dict[tuple[str, str], float]:
    """The least seconds of each model on each workload. Who begins changes from round to round."""
    clock = time.process_time if cpu_time else time.perf_counter
    best: dict[tuple[str, str], float] = {}
    names = list(engines)
    for workload in workloads:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                job = workload.for_vocabulary(engines[name].info.vocab_size)
                start = clock()
                measure(engines[name], job)
                elapsed_s = clock() - start
                best[name, workload.name] = min(elapsed_s, best.get((name, workload.name), elapsed_s))
                print(f"{workload.name}, round {turn + 1}, {name}: {elapsed_s:.2f} s", file=sys.stderr, flush=True)
    return best


if __name__ == "__main__":
    sys.exit(main())

"""Run shardwright and its peers alternately on the standard workloads, and print who is how fast.

    python benchmarks/peers.py MODEL                          # shardwright and Hugging Face generate
    python benchmarks/peers.py MODEL --vllm ~/peers/vllm/run.sh --rounds 5 --output benchmarks/results
    python benchmarks/peers.py MODEL --llama-cpp ~/peers/llamacpp/venv/bin/python --quantized
    python benchmarks/peers.py MODEL --vllm ~/peers/vllm/run.sh --only none --rate 1 --rate 2 --rate 4

Every engine has a process of its own that lives through the run; they compute one at a time, in turns, so that a change
of the machine's mood meets all alike. The best round of each counts. `--vllm` names a launcher that runs Python in an
environment with vLLM, `--llama-cpp` the Python of one with llama-cpp-python (`peer_llama_cpp.py` says how it is made);
nothing else is needed from there. `--rate` adds a load that arrives over time, at the servers of shardwright and vLLM.
Run nothing beside it, and quote the ratios. Starts are measured with files in the page cache; `starts.py` has others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import served_peers
import torch
from contestant import Contestant, contestants, llama_cpp_contestants
from report import as_markdown
from served_peers import Shape

from shardwright.bench.bound import Weights, workload_seconds
from shardwright.bench.machine import Machine, measure_machine
from shardwright.bench.workloads import ALL, Workload, choose
from shardwright.engine.messages import EngineInfo

NONE = "none"
"""In place of a workload: starts and memory only, or the served load."""


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, the same for all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument(
        "--only", action="append", choices=(*ALL, NONE), help="a workload; may be repeated; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each workload on each engine")
    parser.add_argument("--starts", type=int, default=2, help="starts of each engine")
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face generate out")
    parser.add_argument("--vllm", type=Path, help="launcher of an environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--quantized", action="store_true", help="8 and 4 bits too, of shardwright and llama.cpp")
    parser.add_argument("--rate", type=float, action="append", help="serve so many requests/s; may be repeated")
    parser.add_argument("--num-requests", type=int, default=100, help="of each served load")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each served request")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each served request")
    parser.add_argument("--output", type=Path, help="folder for a dated JSON document and table")
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of the table")
    args = parser.parse_args()
    if args.rounds < 1 or args.starts < 1:
        parser.error("--rounds and --starts are at least 1: every engine is started, and every workload run")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the engines' processes whatever ends this one
    machine = measure_machine()
    with tempfile.TemporaryDirectory(prefix="peers-") as logs:
        engines = contestants(logs=Path(logs), hf=not args.no_hf, vllm=args.vllm, quantized=args.quantized)
        if args.llama_cpp:
            engines += llama_cpp_contestants(
                args.llama_cpp, Path(args.model), args.dtype, folder=Path(logs), quantized=args.quantized
            )
        try:
            start_all(engines, args.model, args.dtype, starts=args.starts)
            names = [name for name in args.only or ALL if name != NONE]
            workloads = [w for w in choose(names) if fits(w, engine_info(engines))]
            seconds = run_all(engines, workloads, rounds=args.rounds)
            machine = machine.at_best(measure_machine())  # it may have been busy the first time
            document = as_document(engines, workloads, seconds, machine=machine)
        finally:
            for engine in engines:
                engine.stop()
    document |= {"model": args.model, "dtype": args.dtype, "rounds": args.rounds}
    table = as_markdown(document)
    if args.rate:
        shape = Shape(
            rates=args.rate,
            num_requests=args.num_requests,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
            rounds=args.rounds,
        )
        document["served"] = serve_all(args.model, args.dtype, args.vllm, shape, engine_info(engines), machine)
        table += "\n\n" + "\n".join(served_peers.as_markdown(document["served"], shape))
    print(json.dumps(document) if args.json else table)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        stem = f"{datetime.date.today().isoformat()}-{Path(args.model).name}-{args.dtype}"
        (args.output / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
        (args.output / f"{stem}.md").write_text(table + "\n")


def serve_all(
    model: str, dtype: str, vllm: Path | None, shape: Shape, info: EngineInfo, machine: Machine
) -> list[dict[str, Any]]:
    """Start the servers, one after another, run the loads in turns, end them."""
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        servers = {
            name: stack.enter_context(served_peers.serving(name, command, logs=logs))
            for name, command in served_peers.commands(model, dtype, vllm=vllm).items()
        }
        weights = Weights.of_engine(info)
        return served_peers.run(servers, shape, vocab_size=info.vocab_size, weights=weights, machine=machine)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def engine_info(engines: list[Contestant]) -> EngineInfo:
    """What shardwright, the first of the engines, says of the model."""
    return msgspec.convert(engines[0].facts["info"], EngineInfo)


def fits(workload: Workload, info: EngineInfo) -> bool:
    """Whether the model is long enough for a workload."""
    if workload.longest <= info.max_model_len:
        return True
    say(f"skipping {workload.name}: it needs {workload.longest} tokens a request, the model takes {info.max_model_len}")
    return False


def start_all(engines: list[Contestant], model: str, dtype: str, *, starts: int) -> None:
    """Start each engine several times, in turns; the last time it stays."""
    for turn in range(starts):
        for engine in engines:
            engine.start(model, dtype)
            say(f"{engine.name}: {engine.starts[-1]}")
            if turn < starts - 1:
                engine.stop()


def run_all(engines: list[Contestant], workloads: list[Workload], *, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every round, by workload and engine. Who begins changes from round to round."""
    vocab_size = engine_info(engines).vocab_size
    seconds: dict[tuple[str, str], list[float]] = {}
    for workload in workloads:
        job = workload.for_vocabulary(vocab_size)
        for turn in range(rounds):
            shift = turn % len(engines)
            for engine in engines[shift:] + engines[:shift]:
                seconds.setdefault((workload.name, engine.name), []).append(engine.run(job))
        best = {engine.name: f"{min(seconds[workload.name, engine.name]):.2f} s" for engine in engines}
        say(f"{workload.name}: {best}")
    return seconds


def as_document(
    engines: list[Contestant],
    workloads: list[Workload],
    seconds: dict[tuple[str, str], list[float]],
    *,
    machine: Machine,
) -> dict[str, Any]:
    """All that was measured. A ratio over 1 says that shardwright, with weights of as many bits, is faster."""
    weights = Weights.of_engine(engine_info(engines))
    ours = engines[0].name
    counterparts = {engine.name: engine.counterpart for engine in engines if engine.counterpart is not None}
    rows = []
    for workload in workloads:
        best = {engine.name: min(seconds[workload.name, engine.name]) for engine in engines}
        bound_s = workload_seconds(workload, weights, machine)
        rows.append(
            {
                "name": workload.name,
                "headline": workload.headline,
                "tokens_per_s": {name: round(workload.num_headline_tokens / best[name], 2) for name in best},
                "elapsed_s": {e.name: [round(s, 4) for s in seconds[workload.name, e.name]] for e in engines},
                "ratio": {peer: round(best[peer] / best[own], 3) for peer, own in counterparts.items()},
                "bound_tokens_per_s": round(workload.num_headline_tokens / bound_s, 2),
                "fraction_of_bound": round(bound_s / best[ours], 4),
            }
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.as_json(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{engine.name: engine.facts["version"] for engine in engines},
        },
        "info": engines[0].facts["info"],
        "workloads": rows,
        "starts": {engine.name: min(engine.starts, key=lambda s: s["first_token_s"]) for engine in engines},
        "peak_rss_mib": {engine.name: engine.peak_rss_mib() for engine in engines},
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

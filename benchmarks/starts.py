"""How long shardwright and its peers take from a process's start to its first token: the first time, cold and warm.

    python benchmarks/starts.py MODEL --vllm ~/peers/vllm/run.sh
    python benchmarks/starts.py MODEL --llama-cpp ~/peers/llamacpp/venv/bin/python --gguf FILE --kind cold --kind warm

* first: caches of compiled code are empty, as after installing
* cold: the files of the model and of the engine's environment are no longer in the page cache, as after booting
* warm: right after another start

Files leave the page cache by `posix_fadvise`, which needs no rights, but leaves what a running process has mapped: end
other Python programs first. What share of the bytes stayed is measured and printed; where it is large, "cold" is not.
This process itself imports no torch for that reason. Engines take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestant import Contestant, contestants
from page_cache import evict, resident_share
from report import table, title

CACHE_VARIABLES = (
    "SHARDWRIGHT_CACHE",
    "XDG_CACHE_HOME",
    "VLLM_CACHE_ROOT",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)
"""Where engines keep what they have compiled."""
KINDS = ("first", "cold", "warm")


def main() -> None:
    """Start, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; default: all")
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--vllm", type=Path, help="launcher of an environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="Python of an environment with llama-cpp-python; with --gguf")
    parser.add_argument("--gguf", type=Path, help="the model as `to_gguf.py` writes it")
    parser.add_argument("--output", type=Path, help="folder for a dated JSON document and table")
    args = parser.parse_args()
    if (args.llama_cpp is None) != (args.gguf is None):
        parser.error("--llama-cpp and --gguf go together")
    with tempfile.TemporaryDirectory(prefix="starts-") as logs:
        engines = contestants(logs=Path(logs), hf=not args.no_hf, vllm=args.vllm, quantized=False)
        environments = {"shardwright": sys.executable, "hf": sys.executable, "vllm": args.vllm}
        if args.llama_cpp:
            script = Path(__file__).parent / "peer_llama_cpp.py"
            command = [str(args.llama_cpp), str(script)]
            log = Path(logs) / "llama-cpp.log"
            engines.append(Contestant(name="llama.cpp", command=command, model=str(args.gguf), log=log))
            environments["llama.cpp"] = args.llama_cpp
        files = {
            name: [*files_below(args.gguf or args.model), *files_below(args.model), *environment_files(Path(launcher))]
            for name, launcher in environments.items()
            if launcher is not None
        }
        starts = measure(engines, files, str(args.model), args.dtype, rounds=args.rounds, kinds=args.kind or KINDS)
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": str(args.model),
        "dtype": args.dtype,
        "starts": starts,
    }
    text = as_markdown(document)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        stem = f"{datetime.date.today().isoformat()}-starts-{args.model.name}-{args.dtype}"
        (args.output / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
        (args.output / f"{stem}.md").write_text(text + "\n")


def files_below(path: Path) -> list[Path]:
    """The file, or all files of a folder."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def environment_files(launcher: Path) -> list[Path]:
    """Everything in the virtual environment of a Python, or of one that a launcher script has beside it."""
    folder = launcher.absolute().parent
    homes = [folder.parent, folder / "venv"]
    home = next((home for home in homes if (home / "pyvenv.cfg").exists()), None)
    return [] if home is None else files_below(home)


def measure(
    engines: list[Contestant],
    files: dict[str, list[Path]],
    model: str,
    dtype: str,
    *,
    rounds: int,
    kinds: tuple[str, ...],
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Every start, by engine and kind. Kinds follow each other so that "warm" comes after another start."""
    starts: dict[str, dict[str, list[dict[str, float]]]] = {e.name: {kind: [] for kind in kinds} for e in engines}
    for _ in range(rounds):
        for engine in engines:
            for kind in (kind for kind in KINDS if kind in kinds):
                start = start_once(engine, kind, files.get(engine.name, []), model, dtype)
                starts[engine.name][kind].append(start)
                print(f"{engine.name}, {kind}: {start}", file=sys.stderr, flush=True)
    return starts


def start_once(engine: Contestant, kind: str, files: list[Path], model: str, dtype: str) -> dict[str, float]:
    """One start of one kind: its times and memory, and for a cold one the share of bytes that stayed in memory."""
    share = {}
    if kind == "cold":
        evict(files)
        share = {"resident": round(resident_share(files), 3)}
    with tempfile.TemporaryDirectory(prefix="caches-") as empty:
        try:
            engine.start(model, dtype, environment=dict.fromkeys(CACHE_VARIABLES, empty) if kind == "first" else None)
        finally:
            engine.stop()
    return engine.starts[-1] | share


def as_markdown(document: dict[str, Any]) -> str:
    """One line for each engine and kind: the fastest."""
    lines = []
    for engine, kinds in document["starts"].items():
        for kind, starts in kinds.items():
            best = min(starts, key=lambda start: start["first_token_s"])
            stayed = f"{best['resident']:.0%}" if "resident" in best else "-"
            times = (f"{best[key]:.1f}" for key in ("ready_s", "first_token_s"))
            lines.append([f"{title(engine)}, {kind}", *times, f"{best['peak_rss_mib']:.0f}", stayed])
    header = ["start", "ready, s", "first token, s", "peak memory, MiB", "bytes that stayed in the page cache"]
    heading = f"# Starts of {document['model']}, {document['dtype']}, {document['date']}"
    return "\n".join([heading, "", *table(header, lines)])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

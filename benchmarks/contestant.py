"""The runner's end of `child.py`: start an engine's process, give it jobs, measure its memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shardwright.bench.memory import peak_rss_mib
from shardwright.bench.workloads import Workload

HERE = Path(__file__).parent

GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

OURS = "shardwright"
COUNTERPARTS = {"q8_0": f"{OURS} int8", "q4_0": f"{OURS} int4"}
"""Of ours, those with weights of as many bits."""

STOP_TIMEOUT_S = 20
"""How long an engine may take to end by itself once its jobs are over."""


@dataclass(kw_only=True)
class Contestant:
    """One engine: how its process is started, and the process while there is one."""

    name: str
    command: list[str]
    """Of the process, without MODEL and DTYPE."""
    log: Path
    """Where its stderr goes."""
    model: str | None = None
    """A file of its own format, in place of the model directory."""
    arguments: list[str] = field(default_factory=list)
    """Of the process, after those."""
    counterpart: str | None = None
    """Of ours, the one that a peer is compared with; None for ours."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it said of itself when it started last."""
    starts: list[dict[str, float]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self, model: str, dtype: str, *, environment: dict[str, str] | None = None) -> None:
        """Start the process and note how long it took to its first token, and its memory then.

        Args:
            environment: variables beside those of this process.
        """
        begin = time.time()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*self.command, self.model or model, dtype, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | (environment or {}),
                start_new_session=True,  # a group of its own, so that whatever it starts can be ended with it
            )
        self.facts = self._read()
        self.starts.append(
            {
                "ready_s": round(self.facts.pop("ready") - begin, 3),
                "first_token_s": round(self.facts.pop("first_token") - begin, 3),
                "peak_rss_mib": self.peak_rss_mib(),
            }
        )

    def run(self, workload: Workload) -> float:
        """Run a workload. Returns: seconds, as the engine measured them."""
        assert self.process is not None
        assert self.process.stdin is not None
        job = {"prompts": workload.prompts, "output_tokens": workload.output_tokens}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return float(self._read()["elapsed_s"])

    def peak_rss_mib(self) -> float:
        """Peak memory of the process and its children, added up."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return round(sum(peak_rss_mib(pid) for pid in (self.process.pid, *(child.pid for child in children))), 1)

    def stop(self) -> None:
        """End the process, if there is one, and what it has started."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            self.process.stdin.close()
            self.process.wait(timeout=STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(f"error: {self.name} ended with exit code {code}; the end of {self.log}:\n{tail}")
        document: dict[str, Any] = json.loads(line)
        return document


def contestants(*, logs: Path, hf: bool, vllm: Path | None, quantized: bool) -> list[Contestant]:
    """Ours first, then its peers; llama.cpp's come from `llama_cpp_contestants`."""
    ours = [sys.executable, str(HERE / "peer_shardwright.py")]
    found = [Contestant(name=OURS, command=ours, log=logs / "shardwright.log")]
    for kind in ("int8", "int4") if quantized else ():
        name = f"{OURS} {kind}"
        found.append(Contestant(name=name, command=ours, arguments=[kind], log=logs / f"shardwright-{kind}.log"))
    peers = {
        "hf": [sys.executable, str(HERE / "peer_hf.py")] if hf else None,
        "vllm": [str(vllm), str(HERE / "peer_vllm.py")] if vllm is not None else None,
    }
    for name, command in peers.items():
        if command is not None:
            found.append(Contestant(name=name, command=command, counterpart=OURS, log=logs / f"{name}.log"))
    return found


def llama_cpp_contestants(python: Path, model: Path, dtype: str, *, folder: Path, quantized: bool) -> list[Contestant]:
    """llama.cpp with the model in its own format, which is written into `folder` first.

    Args:
        python: of an environment with llama-cpp-python.
    """
    from to_gguf import convert

    found = []
    for kind in [GGUF_TYPES[dtype], *(("q8_0", "q4_0") if quantized else ())]:
        file = folder / f"{kind}.gguf"
        convert(model, file, kind)
        found.append(
            Contestant(
                name=f"llama.cpp {kind}",
                counterpart=COUNTERPARTS.get(kind, OURS),
                command=[str(python), str(HERE / "peer_llama_cpp.py")],
                model=str(file),
                log=folder / f"llama-cpp-{kind}.log",
            )
        )
    return found

"""How long an engine takes from the start of its process to its first token, and how much memory it needs for that.

The page cache is as warm as the machine has it: emptying it takes more rights than a benchmark should ask for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shardwright.errors import EngineError


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One start of an engine in a process of its own."""

    ready_s: float
    """From the process's start until requests are taken."""
    first_token_s: float
    """From the process's start until the first token of a short prompt is there."""
    peak_rss_mib: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "page_cache": "warm"}


def measure_start(model: str, options: Mapping[str, Any]) -> Start:
    """Start an engine in a fresh process and let it generate one token.

    Raises: EngineError if the process fails, with the last that it said.
    """
    command = [sys.executable, "-m", "shardwright.bench.start_child", model, json.dumps(dict(options))]
    begin = time.time()
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        said = child.stderr.strip().splitlines() or ["nothing"]
        raise EngineError(f"the engine did not start (exit code {child.returncode}), its last words: {said[-1]}")
    moments = json.loads(child.stdout.splitlines()[-1])
    return Start(
        ready_s=round(moments["ready"] - begin, 3),
        first_token_s=round(moments["first_token"] - begin, 3),
        peak_rss_mib=moments["peak_rss_mib"],
    )


def measure_best_start(model: str, options: Mapping[str, Any], *, repeat: int) -> Start:
    """The fastest of several starts."""
    return min((measure_start(model, options) for _ in range(repeat)), key=lambda start: start.first_token_s)

"""The benchmark for GPUs runs, on a CPU and a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.sweep
@pytest.mark.parametrize("is_random", [True, False])
def test_everything_is_measured(is_random: bool, tiny_llama: Path, tmp_path: Path) -> None:
    models = [] if is_random else [str(tiny_llama)]
    command = [
        sys.executable,
        str(SCRIPT),
        *models,
        "--device",
        "cpu",
        "--tiny",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "found.json").read_text())["results"]
    assert ("correctness" in result) is not is_random
    if not is_random:
        assert result["correctness"]["equal"] == result["correctness"]["prompts"] == 3
    for label in ("graphs", "eager", "compiled"):
        assert result[label]["output_tokens_per_s"] > 0
        assert 0 < result[label]["fraction_of_bound"] < 1
        assert result[label]["stages"]

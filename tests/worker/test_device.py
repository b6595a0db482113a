"""A step leaves nothing behind on the CPU that the device needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_steps_run_on_another_device(tiny_llama: Path) -> None:
    """Two layers: two writes and two attentions of each kind of sequences in the step."""
    command = [sys.executable, "-m", "tests.worker.fake_device", str(tiny_llama)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": "ignore"}
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "Backend" in line]
    assert said == [
        "BatchedBackend (2, 128) gpu:0 0",
        "BatchedBackend (3, 128) gpu:0 0",
        "BatchedBackend (2, 128) gpu:0 0",
        "TritonBackend (2, 128) gpu:0 4",
        "TritonBackend (3, 128) gpu:0 10",
        "TritonBackend (2, 128) gpu:0 14",
    ]

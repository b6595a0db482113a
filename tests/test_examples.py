"""Every example runs as its first lines say."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = "smollm2-135m"


def run_example(name: str, argument: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on a port of its own choice."""
    command = [sys.executable, "-m", "shardwright", "serve", MODEL, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log = ""
    while (match := re.search(r"ready on (http://\S+)", log)) is None:
        line = process.stderr.readline()
        assert line, f"the server ended: {log}"
        log += line
    yield f"{match[1]}/v1"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_offline() -> None:
    lines = run_example("offline.py", MODEL).splitlines()
    assert lines[0].startswith("'The capital of France is' -> ' Paris")
    assert len(lines) == 4


def test_async_stream() -> None:
    lines = run_example("async_stream.py", MODEL).splitlines()
    assert {line.split(":")[0] for line in lines} == {"'The sea is'", "'The desert is'", "'The forest is'"}
    order = [line.split(":")[0] for line in lines]
    assert order != sorted(order, key=order.index), "the completions ran one after another"


def test_plan_proof() -> None:
    wrong, right = run_example("plan_proof.py", MODEL).split("\n\n")
    assert "error: model.layers.*.self_attn.o_proj" in wrong
    assert right.splitlines()[-1].startswith("proof holds: ")
    assert "not ok" not in right


def test_openai_client(url: str) -> None:
    *answer, completion = run_example("openai_client.py", url).splitlines()
    assert len(" ".join(answer)) > 20
    assert "Paris" in completion


def test_no_example_is_forgotten() -> None:
    tested = {f"{name.removeprefix('test_')}.py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested

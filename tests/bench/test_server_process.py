from __future__ import annotations

import sys

import psutil
import pytest

from shardwright.bench.server_process import as_flags, running
from shardwright.errors import EngineError, UsageError

CHATTY = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready on http://127.0.0.1:1", child.pid, file=sys.stderr, flush=True)
for _ in range(20_000):
    print("a line for the log", file=sys.stderr)
print("http://127.0.0.1:2 ready", flush=True)
signal.pause()
"""


def test_options_become_the_flags_that_they_came_from() -> None:
    options = {"max_model_len": 64, "enable_prefix_caching": False, "enforce_eager": True, "lora_modules": ["a", "b"]}
    assert as_flags(options) == [
        "--max-model-len=64",
        "--no-enable-prefix-caching",
        "--enforce-eager",
        "--lora-modules=a",
        "--lora-modules=b",
    ]


def test_a_server_is_ended_with_all_that_it_has_started() -> None:
    before = set(psutil.Process().children(recursive=True))
    with running([sys.executable, "-c", CHATTY]) as url:
        assert url == "http://127.0.0.1:1"
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) == 2
    gone, alive = psutil.wait_procs(started, timeout=5)
    assert len(gone) == 2
    assert not alive


@pytest.mark.parametrize(("code", "error"), [(2, UsageError), (3, EngineError)])
def test_a_server_that_fails_is_told_with_its_last_words(code: int, error: type[Exception]) -> None:
    program = f"import sys; print('a\\nerror: oh dear\\n', file=sys.stderr); sys.exit({code})"
    with pytest.raises(error, match="oh dear$"), running([sys.executable, "-c", program]):
        pass

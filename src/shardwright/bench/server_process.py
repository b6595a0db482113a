"""`shardwright serve` in a process of its own, for as long as a benchmark needs it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from shardwright.errors import EngineError, UsageError

READY = re.compile(r"ready on (https?://\S+)")
STOP_TIMEOUT_S = 15.0
LAST_LINES = 20
USAGE_EXIT_CODE = 2


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options, as `with_flags` gives them, as the flags that they came from."""
    flags: list[str] = []
    for name, value in options.items():
        spelled = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{spelled}" if value else f"--no-{spelled}")
        elif isinstance(value, list | tuple):
            flags += [f"--{spelled}={one}" for one in value]
        else:
            flags.append(f"--{spelled}={value}")
    return flags


@contextlib.contextmanager
def served_model(model: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Serve a model on a free port of this machine, with engine options. Yields the address.

    Raises: UsageError or EngineError, with the server's own words, if it ends before it is ready.
    """
    arguments = ["serve", "--host=127.0.0.1", "--port=0", *as_flags(options), "--", model]
    with running([sys.executable, "-m", "shardwright", *arguments]) as url:
        yield url


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[str]:
    """A server process that says on stderr where it is ready. It gets a group of its own, so that Ctrl-C is ours."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    with process.stderr:
        try:
            url = wait_until_ready(process, process.stderr)
            reader = threading.Thread(target=discard, args=(process.stderr,))
            reader.start()  # a full pipe would stop the server
            try:
                yield url
            finally:
                stop(process)
                reader.join()
        finally:
            stop(process)


def discard(stream: IO[str]) -> None:
    """Read to the end."""
    for _ in stream:
        pass


def wait_until_ready(process: subprocess.Popen[str], stream: IO[str]) -> str:
    """Read what the server says until it is ready. Returns: its address."""
    lines: deque[str] = deque(maxlen=LAST_LINES)
    for line in stream:
        lines.append(line.strip())
        if match := READY.search(line):
            return match[1]
    said = next((line for line in reversed(lines) if line), "nothing")
    if process.wait() == USAGE_EXIT_CODE:
        raise UsageError(said.removeprefix("error: "))
    raise EngineError(f"the server did not start (exit code {process.returncode}), its last words: {said}")


def stop(process: subprocess.Popen[str]) -> None:
    """End the server and whatever it has started: first by asking, and if it takes too long, by force."""
    if process.returncode is not None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

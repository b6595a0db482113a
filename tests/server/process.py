"""Server processes that tests start, talk to and end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from shardwright.server.launch import bind

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody has, just now."""
    with bind("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
        return port


class ServerProcess:
    """A Python program that serves on `port`.

    Args:
        arguments: of the Python interpreter.
        port: where it will listen.
    """

    def __init__(self, *arguments: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(self.process.communicate()[1])

    def metrics(self) -> dict[str, float]:
        """Values by name, without the `shardwright_`."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        values = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("shardwright_"): float(value) for name, value in values}

    def end(self, timeout_s: float = 15) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """End it, whatever it is doing; for cleaning up."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

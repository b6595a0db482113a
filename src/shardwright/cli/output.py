"""Where things are printed: results on stdout, logs, progress and remarks on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.text import Text

_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """While open, what a model's own code prints goes to stderr, and only what is printed here to stdout."""
    token = _results.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def results() -> TextIO:
    """The stream for results."""
    return _results.get() or sys.stdout


def print_json(document: Any) -> None:
    """Print the one JSON document of a command."""
    results().write(json.dumps(document, ensure_ascii=False, default=str) + "\n")


def print_text(text: str, *, end: str = "\n") -> None:
    """Print a result as it is, at once: model output is never markup."""
    results().write(text + end)
    results().flush()


def stdout() -> Console:
    """A console for results that are more than text."""
    return Console(file=results(), highlight=False)


def stderr() -> Console:
    """A console for remarks and progress. Made anew each time, since tests and shells swap the stream."""
    return Console(stderr=True, highlight=False)


def remark(text: str) -> None:
    """Say something beside the result."""
    stderr().print(Text(text, style="dim"), soft_wrap=True)


def print_error(text: str) -> None:
    """Print `error: ...` on one line of stderr."""
    stderr().print(Text.assemble(("error:", "bold red"), f" {text}"), soft_wrap=True)


def announce(text: str) -> None:
    """Tell a person at a terminal what the wait is for. What follows may draw progress bars of its own."""
    if sys.stderr.isatty():
        remark(f"{text} ...")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on a terminal while something takes time."""
    with stderr().status(what):
        yield


def show_logs(level: int) -> None:
    """Send the log to stderr from this level on. Called once, by the command that runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("shardwright")
    logger.handlers = [handler]
    logger.setLevel(level)


def process_age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included."""
    return time.time() - float(psutil.Process().create_time())

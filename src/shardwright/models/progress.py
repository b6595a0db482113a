"""Stages of a long fetch, told on stderr: progress bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def announce(text: str) -> None:
    """Say on stderr that something begins."""
    print(f"{text} ...", file=sys.stderr, flush=True)


@contextmanager
def stage(text: str, *, total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show one stage while the `with` block runs.

    Args:
        text: what happens, e.g. "Downloading smollm2-135m".
        total_bytes: how many bytes there are to come; None shows a spinner.

    Yields: a function that takes how many bytes are done so far.
    """
    if not sys.stderr.isatty():
        announce(text)
        yield lambda completed_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
    columns += [DownloadColumn()] if total_bytes is not None else []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total_bytes)
        yield lambda completed_bytes: progress.update(task, completed=completed_bytes)
        if total_bytes is None:
            progress.update(task, total=1, completed=1)
        else:
            progress.update(task, completed=total_bytes)

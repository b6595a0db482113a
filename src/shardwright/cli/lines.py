"""Lines typed by a person: editing and a history that outlives the program."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from pathlib import Path

HISTORY_LENGTH = 1000


def state_directory() -> Path:
    """Where the user's state lives: $XDG_STATE_HOME/shardwright."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "shardwright"


def edit_lines(name: str) -> None:
    """From now on `input()` edits lines and remembers them in the file `name` of the state directory.

    A directory that cannot be written costs the history, not the session.
    """
    try:
        import readline
    except ImportError:  # a Python without it still reads lines
        return
    path = state_directory() / name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LENGTH)

    def save() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(save)


def read_line(prompt: str) -> str:
    """The next line; the prompt is shown to a person only. Raises EOFError at the end."""
    return input(prompt if sys.stdin.isatty() else "")

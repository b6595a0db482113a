"""What an exception means for a terminal: one line and an exit code. The only place that maps the one to the other.

* 0: done
* 1: the run failed, or the thing checked does not hold
* 2: wrong usage or bad input: mending it is up to the caller
* 130: Ctrl-C
* 141: the reader of our output went away
"""

from __future__ import annotations

from shardwright.errors import ShardwrightError, UsageError

INTERRUPTED = 130
BROKEN_PIPE = 141


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ended with this error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, UsageError):
        return 2
    # typer's own errors and exits carry their code; their classes moved between its releases
    return int(getattr(error, "exit_code", 1))


def message(error: BaseException) -> str:
    """The error on one line, with a way out."""
    if isinstance(error, ShardwrightError):
        text = str(error)
    elif hasattr(error, "format_message"):
        text = error.format_message().replace("Value error, ", "").rstrip(".")
        if context := getattr(error, "ctx", None):
            text += f"; see `{context.command_path} --help`"
    else:
        text = f"{type(error).__name__}: {error} (a bug in shardwright, or the machine failed; --debug shows where)"
    return " ".join(text.split())

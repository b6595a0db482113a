"""The program `shardwright`: its commands, and how each of its runs ends.

Commands import torch, the engine and the clients when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from shardwright.cli import bench, chat, complete, inspect, models, plan, run, serve
from shardwright.cli.errors import exit_code, message
from shardwright.cli.help import examples
from shardwright.cli.output import print_error, show_logs
from shardwright.foreign_models import remember_model_names

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for command in (run, serve, complete, chat, models, inspect, plan, bench):
    command.register(app)


def print_version(wanted: bool) -> None:
    """Answer `--version`."""
    if wanted:
        sys.stdout.write(f"shardwright {importlib.metadata.version('shardwright')}\n")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog=examples(
        "shardwright run smollm2-135m --chat 'Why is the sky blue?'",
        "shardwright serve smollm2-135m",
        "shardwright chat",
        "shardwright bench decode smollm2-135m",
    ),
)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log everything and show tracebacks; works on every command.")
    ] = False,
) -> None:
    """Serve the model you trained, from the code you trained it with."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Split `--debug`, which may stand anywhere before `--`, from the other arguments."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [argument for argument in arguments[:end] if argument != "--debug"]
    return rest + list(arguments[end:]), len(rest) < end


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line. Returns: its exit code; the error, if any, is printed."""
    arguments, debug = take_debug(arguments)
    show_logs(logging.DEBUG if debug else logging.WARNING)
    program: Any = typer.main.get_command(app)
    try:
        with program.make_context("shardwright", arguments) as context:
            program.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug=debug)
    return 0


def report(error: BaseException, *, debug: bool) -> int:
    """Tell the user what went wrong. Returns: the exit code."""
    if isinstance(error, BrokenPipeError):
        # whoever read our output has enough: point stdout at nothing, so that the interpreter's last flush is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_code(error)
    if debug:
        traceback.print_exception(error)
    if not isinstance(error, KeyboardInterrupt):
        print_error(message(error))
    return exit_code(error)


def main() -> None:
    """Entry point of the installed program."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # text in any language, whatever the locale
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # Transformers' bars too: a log is no place for them
    remember_model_names()
    sys.exit(run_command(sys.argv[1:]))

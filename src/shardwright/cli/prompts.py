"""Prompts from arguments, from token ids and from lines of stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shardwright.errors import UsageError


def check_text(text: str, where: str) -> str:
    """The text itself. Raises UsageError if the shell passed bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"{where} is not valid UTF-8: convert it, e.g. with iconv -t UTF-8") from exc
    return text


def parse_token_ids(text: str) -> list[int]:
    """Token ids from `1,2,3`. Raises UsageError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise UsageError(
            f"--prompt-token-ids is {text!r} but must be whole numbers with commas between: 1,2,3"
        ) from exc


def read_stdin() -> str:
    """All of stdin as text. Raises UsageError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as exc:
        raise UsageError(f"stdin is not valid UTF-8 at byte {exc.start}: convert it, e.g. with iconv -t UTF-8") from exc


def read_prompts(arguments: Sequence[str], token_ids: Sequence[str] = ()) -> list[str | list[int]]:
    """The prompts of a command: its arguments, then the token ids; where there are neither, the lines of stdin.

    Raises: UsageError if that leaves no prompt, or one cannot be read.
    """
    prompts: list[str | list[int]] = [check_text(text, f"prompt {i}") for i, text in enumerate(arguments, start=1)]
    prompts += [parse_token_ids(text) for text in token_ids]
    if prompts:
        return prompts
    if sys.stdin.isatty():
        raise UsageError("no prompt: give one as an argument, or one a line on stdin")
    prompts += [line for line in read_stdin().splitlines() if line.strip()]
    if not prompts:
        raise UsageError("stdin holds no prompt: write one a line, or give one as an argument")
    return prompts

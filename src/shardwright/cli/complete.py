"""`shardwright complete`: text completions from a server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwright.cli.client import (
    DEFAULT_URL,
    ApiKey,
    MaxTokens,
    ModelName,
    Temperature,
    Url,
    choose_model,
    connect,
    server_errors,
)
from shardwright.cli.help import Command, examples
from shardwright.cli.lines import edit_lines, read_line
from shardwright.cli.options import Json
from shardwright.cli.output import print_json, print_text, remark
from shardwright.cli.prompts import check_text, read_stdin
from shardwright.errors import UsageError

if TYPE_CHECKING:
    import openai

EXAMPLES = examples(
    'shardwright complete "Once upon a time" --max-tokens 64',
    'shardwright complete -q "2 + 2 =" --temperature 0 --json',
    "shardwright complete < prompt.txt",
    "shardwright complete                      (asks for prompts, one a line)",
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("complete", cls=Command, epilog=EXAMPLES)(complete)


def complete(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to go on from; default: all of stdin.")
    ] = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", metavar="TEXT", help="The same as PROMPT.")] = None,
    url: Url = DEFAULT_URL,
    model: ModelName = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    json: Json = False,
) -> None:
    """Complete a text with a model of any OpenAI-compatible server."""
    if prompt is not None and quick is not None:
        raise UsageError("PROMPT and --quick both give a prompt: leave one out")
    text = one_text(prompt if prompt is not None else quick, json=json)
    client = connect(url, api_key)
    with server_errors(url):
        options: dict[str, Any] = {"model": choose_model(client, model)}
        options |= {} if max_tokens is None else {"max_tokens": max_tokens}
        options |= {} if temperature is None else {"temperature": temperature}
        if json:
            answer = client.completions.create(prompt=text, **options)
            choice = answer.choices[0]
            usage = answer.usage and answer.usage.model_dump(exclude_none=True)
            print_json(
                {"model": answer.model, "text": choice.text, "finish_reason": choice.finish_reason, "usage": usage}
            )
        elif text is not None:
            stream(client, text, options)
        else:
            ask(client, options)


def one_text(given: str | None, *, json: bool) -> str | None:
    """The one prompt, or None if a person is to type them."""
    if given is None and sys.stdin.isatty():
        if json:
            raise UsageError("--json needs a prompt: give one as an argument")
        return None
    text = check_text(given, "the prompt") if given is not None else read_stdin().removesuffix("\n")
    if not text:
        raise UsageError("the prompt is empty: give one as an argument, or on stdin")
    return text


def stream(client: openai.OpenAI, prompt: str, options: dict[str, Any]) -> None:
    """Print a completion as it comes."""
    for event in client.completions.create(prompt=prompt, stream=True, **options):
        for choice in event.choices:
            print_text(choice.text, end="")
    print_text("")


def ask(client: openai.OpenAI, options: dict[str, Any]) -> None:
    """Complete one typed line after another, until Ctrl-D."""
    edit_lines("complete_history")
    remark(f"{options['model']}: type a text to complete; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            prompt = read_line("> ")
        except (EOFError, KeyboardInterrupt):
            print_text("")
            return
        if prompt:
            try:
                stream(client, prompt, options)
            except KeyboardInterrupt:
                remark("\n(stopped)")

"""`shardwright chat`: talk to a model of any OpenAI-compatible server."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
from shardwright.cli.conversation import Answer, Conversation
from shardwright.cli.errors import message
from shardwright.cli.help import Command, examples
from shardwright.cli.lines import edit_lines, read_line
from shardwright.cli.options import Json
from shardwright.cli.output import print_error, print_json, print_text, remark
from shardwright.cli.prompts import check_text
from shardwright.errors import ShardwrightError, UsageError

EXAMPLES = examples(
    "shardwright chat",
    'shardwright chat --system "Answer in one sentence." --temperature 0.7',
    'shardwright chat -q "Why is the sky blue?"',
    "shardwright chat --url http://localhost:8001/v1 --model my-model",
)

HELP = """/help         this list
/reset        forget the conversation, keep the system message
/system TEXT  set the system message; without TEXT, show it
/retry        ask for the last answer again
/exit         leave; so does Ctrl-D, or Ctrl-C twice
Ctrl-C stops an answer. A message that begins with / is written with a space before it."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("chat", cls=Command, epilog=EXAMPLES)(chat)


def chat(
    quick: Annotated[
        str | None, typer.Option("--quick", "-q", metavar="TEXT", help="Ask this, print the answer and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    url: Url = DEFAULT_URL,
    model: ModelName = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    json: Json = False,
) -> None:
    """Chat with a model of any OpenAI-compatible server. Type /help in the chat for its commands."""
    if json and quick is None:
        raise UsageError("--json prints one answer: give the question with --quick TEXT")
    if quick is not None and not check_text(quick, "--quick").strip():
        raise UsageError("--quick is empty: give the question, e.g. -q 'Why is the sky blue?'")
    client = connect(url, api_key)
    with server_errors(url):
        options: dict[str, Any] = {"model": choose_model(client, model)}
    options |= {} if max_tokens is None else {"max_tokens": max_tokens}
    options |= {} if temperature is None else {"temperature": temperature}
    session = Session(Conversation(client, options, system=system), url=url)
    if quick is not None:
        session.ask_once(quick, json=json)
    else:
        session.run()


class Session:
    """Reads what the user types and prints what the model says.

    From a pipe, each line is a message and the first failure ends the session; with a person it goes on.
    """

    def __init__(self, conversation: Conversation, *, url: str) -> None:
        self.conversation = conversation
        self.url = url
        self.interactive = sys.stdin.isatty()

    def ask_once(self, text: str, *, json: bool) -> None:
        self.conversation.say(text)
        with server_errors(self.url):
            answer = self.conversation.answer((lambda _: None) if json else (lambda part: print_text(part, end="")))
        if answer.stopped:
            raise KeyboardInterrupt
        if not json:
            print_text("")
            return
        model = self.conversation.options["model"]
        print_json({"model": model, "text": answer.text, "finish_reason": answer.finish_reason, "usage": answer.usage})

    def run(self) -> None:
        """Talk until the user leaves."""
        if self.interactive:
            edit_lines("chat_history")
            remark(f"{self.conversation.options['model']} at {self.url}: /help lists the commands")
        interrupts = 0
        while True:
            try:
                line = read_line("> ")
            except EOFError:
                break
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 2 or not self.interactive:
                    break
                remark("\n(Ctrl-C again or Ctrl-D to leave)")
                continue
            interrupts = 0
            try:
                if not self.handle(line):
                    return
            except ShardwrightError as error:
                if not self.interactive:
                    raise
                print_error(message(error))
        if self.interactive:
            print_text("")

    def handle(self, line: str) -> bool:
        """Act on one line. Returns: False to leave."""
        if line.startswith("/"):
            return self.obey(*line.strip().partition(" ")[::2])
        if line.strip():
            self.conversation.say(line.strip())
            self.answer()
        return True

    def obey(self, command: str, argument: str) -> bool:
        """Carry out a command of the chat. Returns: False to leave."""
        match command:
            case "/exit" | "/quit":
                return False
            case "/help":
                remark(HELP)
            case "/reset":
                self.conversation.reset()
                remark("(forgotten)")
            case "/system":
                self.conversation.system = argument.strip() or self.conversation.system
                remark(f"(system message: {self.conversation.system or 'none'})")
            case "/retry":
                if self.conversation.take_back():
                    self.answer()
                else:
                    remark("(nothing to answer yet)")
            case _:
                remark(f"({command} is no command; /help lists them)")
        return True

    def answer(self) -> None:
        """Print the model's answer as it comes."""
        with server_errors(self.url):
            answer = self.conversation.answer(lambda part: print_text(part, end=""))
        print_text("")
        if self.interactive:
            remark(summary(answer))
        elif answer.stopped:
            raise KeyboardInterrupt


def summary(answer: Answer) -> str:
    """What to say below an answer."""
    tokens = (answer.usage or {}).get("completion_tokens")
    speed = f"{tokens} tokens, {tokens / answer.elapsed_s:.1f} tok/s" if tokens else f"{answer.elapsed_s:.1f} s"
    ends = ", stopped" if answer.stopped else ", cut at the most tokens" if answer.finish_reason == "length" else ""
    return f"({speed}{ends})"

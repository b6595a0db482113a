"""`complete`, `chat` and `models` against an OpenAI-compatible server."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import FakeServer, Result

Shardwright: TypeAlias = "Callable[..., Result]"

NOBODY = "http://127.0.0.1:9/v1"


def test_models_lists_what_the_server_has(shardwright: Shardwright, server: FakeServer) -> None:
    result = shardwright("models", "--url", server.url)
    assert (result.code, result.stdout) == (0, "echo  (max_model_len 4096)\n")
    assert shardwright("models", "--url", server.url, "--json").json["models"][0]["id"] == "echo"


def test_complete_streams_the_text(shardwright: Shardwright, server: FakeServer) -> None:
    result = shardwright("complete", "hello", "--url", server.url, "--max-tokens", "7", "--temperature", "0")
    assert (result.code, result.stdout) == (0, "you said hello\n")
    assert server.requests[0] == {
        "model": "echo",
        "prompt": "hello",
        "stream": True,
        "max_tokens": 7,
        "temperature": 0.0,
    }


def test_complete_prints_one_json_document(shardwright: Shardwright, server: FakeServer) -> None:
    document = shardwright("complete", "-q", "hello", "--url", server.url, "--json").json
    assert document["text"] == "you said hello"
    assert document["usage"]["completion_tokens"] == 3


def test_complete_takes_the_whole_of_stdin_as_one_prompt(shardwright: Shardwright, server: FakeServer) -> None:
    shardwright("complete", "--url", server.url, stdin="zwei\nZeilen: ü\n".encode())
    assert server.requests[0]["prompt"] == "zwei\nZeilen: ü"


def test_chat_quick_asks_once(shardwright: Shardwright, server: FakeServer) -> None:
    result = shardwright("chat", "-q", "hello", "--system", "be kind", "--url", server.url)
    assert (result.code, result.stdout, result.stderr) == (0, "you said hello\n", "")
    assert [m["role"] for m in server.requests[0]["messages"]] == ["system", "user"]


def test_chat_quick_prints_one_json_document(shardwright: Shardwright, server: FakeServer) -> None:
    document = shardwright("chat", "-q", "hello", "--url", server.url, "--json").json
    assert (document["text"], document["finish_reason"]) == ("you said hello", "stop")


def test_chat_from_a_pipe_takes_each_line_as_a_message(shardwright: Shardwright, server: FakeServer) -> None:
    result = shardwright("chat", "--url", server.url, stdin=b"one\ntwo\n/retry\n/reset\nthree\n/exit\nfour\n")
    assert result.stdout == "you said one\nyou said two\nyou said two\nyou said three\n"
    said = [[m["content"] for m in request["messages"]] for request in server.requests]
    assert said == [
        ["one"],
        ["one", "you said one", "two"],
        ["one", "you said one", "two"],
        ["three"],
    ]


def test_chat_replaces_a_message_that_was_never_answered(server: FakeServer) -> None:
    from shardwright.cli.client import connect
    from shardwright.cli.conversation import Conversation

    conversation = Conversation(connect(server.url, None), {"model": "echo"})
    conversation.say("lost")
    conversation.say("kept")
    conversation.answer(lambda part: None)
    assert [m["content"] for m in conversation.messages] == ["kept", "you said kept"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["chat", "-q", "hi", "--url", NOBODY], 1, "no server answers at http://127.0.0.1:9/v1: start one with"),
        (["complete", "hi", "--url", NOBODY], 1, "shardwright serve"),
        (["models", "--url", NOBODY], 1, "no server answers"),
        (["models", "--url", "localhost:8000"], 2, "must begin with http://"),
        (["complete", "a", "-q", "b"], 2, "leave one out"),
        (["complete", ""], 2, "the prompt is empty"),
        (["complete"], 2, "the prompt is empty"),
        (["chat", "--json"], 2, "--quick TEXT"),
        (["chat", "-q", " "], 2, "--quick is empty"),
        (["chat", "-q", "hi", "--max-tokens", "0"], 2, "--max-tokens"),
    ],
)
def test_wrong_use_is_one_line_and_an_exit_code(
    shardwright: Shardwright, arguments: list[str], code: int, says: str
) -> None:
    result = shardwright(*arguments)
    assert (result.code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--api-key", "wrong"], 2, "refuses the key"),
        (["--model", "other"], 2, "no model is called 'other'"),
    ],
)
def test_what_the_server_refuses_is_said(
    shardwright: Shardwright, server: FakeServer, arguments: list[str], code: int, says: str
) -> None:
    result = shardwright("chat", "-q", "hi", "--url", server.url, *arguments)
    assert (result.code, result.stdout) == (code, "")
    assert says in result.stderr


def test_a_failing_server_is_exit_code_1(shardwright: Shardwright, server: FakeServer) -> None:
    result = shardwright("complete", "fail", "--url", server.url)
    assert result.code == 1
    assert "says 500: the engine died" in result.stderr


def test_the_key_may_come_from_the_environment(
    shardwright: Shardwright, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWRIGHT_API_KEY", server.api_key)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert shardwright("models", "--url", server.url).code == 0


class Terminal:
    """A program on a terminal of its own: type into it, read its screen."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardwright", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "dumb"},
        )
        os.close(slave)
        self.screen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def read_until(self, text: str) -> None:
        """Wait for a text to appear behind what was read before."""
        deadline = time.monotonic() + 30
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} is not on the screen: {self.screen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.screen += os.read(self.master, 4096).decode()
        self.screen = self.screen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, by a hand that is slow enough for readline to wait for it."""
        time.sleep(0.3)
        self.process.send_signal(signal.SIGINT)


def test_ctrl_c_stops_the_answer_and_not_the_program(server: FakeServer, tmp_path: Path) -> None:
    with Terminal("chat", "--url", server.url, state=tmp_path) as terminal:
        terminal.read_until("/help lists the commands")
        terminal.read_until("> ")
        terminal.type("slow\n")
        terminal.read_until("more more")
        terminal.interrupt()
        terminal.read_until("stopped")
        terminal.read_until("> ")
        server.wait_for_abandoned(1)
        terminal.type("fast\n")
        terminal.read_until("you said fast")
        terminal.read_until("> ")
        terminal.type("fail\n")
        terminal.read_until("error: ")
        terminal.read_until("> ")
        terminal.interrupt()
        terminal.read_until("again or Ctrl-D to leave")
        terminal.read_until("> ")
        terminal.interrupt()
        assert terminal.process.wait(timeout=10) == 0
    assert (tmp_path / "shardwright" / "chat_history").read_text().split() == ["slow", "fast", "fail"]
    assert server.requests[1]["messages"][1]["content"].startswith("you said slow more")

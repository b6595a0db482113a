"""What the command-line tests share: commands run in this process, and a small OpenAI-compatible server to talk to."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from shardwright.cli.main import run_command


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def shardwright(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process: `shardwright("run", model, stdin=b"...")`."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = run_command(arguments)
        return Result(code, *capsys.readouterr())

    return run


@dataclass
class FakeServer:
    """A server that answers with what it was asked; "slow" in a prompt makes it talk until the client leaves."""

    url: str = ""
    api_key: str = "right"
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_abandoned: int = 0

    def wait_for_abandoned(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while self.num_abandoned < count:
            assert time.monotonic() < deadline, "the client did not close its connection"
            time.sleep(0.01)


class Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        if self.authorized():
            self.reply(200, {"object": "list", "data": [{"id": "echo", "object": "model", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.requests.append(body)
        if not self.authorized():
            return
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if body["model"] != "echo":
            self.reply(404, {"error": {"message": f"no model is called {body['model']!r}"}})
        elif "fail" in prompt:
            self.reply(500, {"error": {"message": "the engine died"}})
        elif body.get("stream"):
            with contextlib.suppress(OSError):
                self.stream(prompt, chat=chat)
        else:
            text = f"you said {prompt}"
            choice = {"index": 0, "finish_reason": "stop"} | (
                {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            )
            usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
            self.reply(
                200, {"id": "1", "object": "x", "model": "echo", "created": 0, "choices": [choice], "usage": usage}
            )

    def authorized(self) -> bool:
        if self.headers["Authorization"] in (f"Bearer {self.fake.api_key}", "Bearer none"):
            return True
        self.reply(401, {"error": {"message": "wrong key"}})
        return False

    def reply(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, prompt: str, *, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("you ", "said ", prompt):
            self.send_event(word, chat=chat)
        while "slow" in prompt:
            try:
                self.send_event(" more", chat=chat)
            except OSError:
                self.fake.num_abandoned += 1
                raise
            time.sleep(0.02)
        self.send_event("", chat=chat, finish_reason="stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, text: str, *, chat: bool, finish_reason: str | None = None) -> None:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        event: dict[str, Any] = {"id": "1", "object": "x", "model": "echo", "created": 0, "choices": [choice]}
        if finish_reason is not None:
            event["usage"] = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A running FakeServer; the environment has no key of its own."""
    for name in ("SHARDWRIGHT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"fake": fake}))
    fake.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    http.shutdown()
    http.server_close()
    thread.join()

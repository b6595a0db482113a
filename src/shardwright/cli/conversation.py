"""A conversation with a chat model: its messages, and answers that stream into it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai


@dataclass(kw_only=True, slots=True)
class Answer:
    """One answer, complete or as far as it came."""

    text: str = ""
    finish_reason: str | None = None
    stopped: bool = False
    """By Ctrl-C."""
    usage: dict[str, Any] | None = None
    elapsed_s: float = 0.0


class Conversation:
    """Messages so far and the server that continues them.

    The list ends with the user's message while that has no answer: then the next message takes its place, so that
    roles alternate, as most chat templates insist.
    """

    def __init__(self, client: openai.OpenAI, options: dict[str, Any], *, system: str | None = None) -> None:
        self.client = client
        self.options = options
        self.system = system
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages.clear()

    def say(self, text: str) -> None:
        """Add the user's message, in place of one that was never answered."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})

    def take_back(self) -> bool:
        """Drop the last answer, so that `answer` tries again. Returns: False if there is nothing to answer."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def answer(self, show: Callable[[str], None]) -> Answer:
        """Stream the next answer through `show` and remember it; Ctrl-C ends it early and keeps what came."""
        answer = Answer()
        start = time.perf_counter()
        try:
            self._stream(answer, show)
        except KeyboardInterrupt:
            answer.stopped = True
        answer.elapsed_s = time.perf_counter() - start
        if answer.text or not answer.stopped:
            self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def _stream(self, answer: Answer, show: Callable[[str], None]) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages: Any = [*system, *self.messages]
        events: Any = self.client.chat.completions.create(
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **self.options,
        )
        with events:  # leaving early closes the connection, which ends the request on the server
            for event in events:
                if event.usage is not None:
                    answer.usage = event.usage.model_dump(exclude_none=True)
                for choice in event.choices:
                    if choice.delta.content:
                        answer.text += choice.delta.content
                        show(choice.delta.content)
                    answer.finish_reason = choice.finish_reason or answer.finish_reason

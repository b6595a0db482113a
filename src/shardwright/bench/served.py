"""Offer a load to an OpenAI-compatible server, and measure what its clients see.

Every request is a stream of its own. Times count from the moment at which a request was due, so that a client or a
server that falls behind is not hidden by the requests that it delays.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec

from shardwright.bench.bound import Weights
from shardwright.bench.http_stream import Server, StreamError, get_json, post_events
from shardwright.bench.load import Load, load_seconds
from shardwright.bench.run import percentiles

if TYPE_CHECKING:
    from shardwright.bench.machine import Machine

DONE = b"[DONE]"
WARM_UP_REQUESTS = 2
WARM_UP_TOKENS = 8


class Choice(msgspec.Struct):
    """What an event says of the one completion."""

    text: str = ""
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Event(msgspec.Struct):
    """A server-sent event of a completion, or of its failure."""

    choices: list[Choice] = []
    error: Any = None


class Card(msgspec.Struct):
    """What a server says of its model."""

    id: str
    root: str = ""
    max_model_len: int | None = None


class Cards(msgspec.Struct):
    """The answer of `/v1/models`."""

    data: list[Card]


class Status(msgspec.Struct):
    """What shardwright's `/status` says beyond that."""

    device: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    vocab_size: int


@dataclass(kw_only=True, slots=True)
class Answer:
    """One request as its client saw it; moments are seconds from the start of the load."""

    due_s: float
    sent_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    """When each event with tokens came."""
    num_tokens: int = 0
    done_s: float | None = None
    failure: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.done_s is not None and self.failure is None


@dataclass(kw_only=True, slots=True)
class Served:
    """One load and its answers, of all requests or of those sent before it was ended."""

    load: Load
    answers: list[Answer]

    @classmethod
    def of(cls, load: Load) -> Served:
        return cls(load=load, answers=[Answer(due_s=due) for due in load.arrivals_s()])

    @property
    def sent(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.sent_s is not None]

    @property
    def complete(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.is_complete]

    @property
    def failures(self) -> Counter[str]:
        """How many requests failed for each reason."""
        return Counter(answer.failure for answer in self.answers if answer.failure is not None)

    @property
    def elapsed_s(self) -> float:
        """From the first arrival to the last token."""
        return max((answer.token_s[-1] for answer in self.answers if answer.token_s), default=0.0)

    @property
    def offered_rate(self) -> float | None:
        """Requests a second as they were sent, or None for a single one."""
        sent = [answer.sent_s for answer in self.answers if answer.sent_s is not None]
        return (len(sent) - 1) / (max(sent) - min(sent)) if len(sent) > 1 and max(sent) > min(sent) else None

    @property
    def ttft_s(self) -> list[float]:
        return [answer.token_s[0] - answer.due_s for answer in self.answers if answer.token_s]

    @property
    def itl_s(self) -> list[float]:
        """Between one event with tokens and the next of its request."""
        return [after - before for answer in self.answers for before, after in pairwise(answer.token_s)]

    @property
    def latency_s(self) -> list[float]:
        """From when a request was due to its last token; of those that are complete."""
        return [answer.token_s[-1] - answer.due_s for answer in self.complete if answer.token_s]


async def read_card(server: Server) -> Card:
    """The model of a server. Raises StreamError if it has none."""
    cards = msgspec.convert(await get_json(server, "/v1/models"), Cards)
    if not cards.data:
        raise StreamError(f"the server at {server.url} lists no model")
    return cards.data[0]


async def read_status(server: Server) -> Status | None:
    """What a shardwright server says of itself; None of others."""
    try:
        return msgspec.convert(await get_json(server, "/status"), Status)
    except (StreamError, msgspec.ValidationError):
        return None


async def warm_up(server: Server, model: str, *, prompt_tokens: int, vocab_size: int | None) -> None:
    """A few requests that are not measured, so that none pays for what is set up on first use.

    Raises: StreamError if one fails, since then all will.
    """
    load = Load(rate=1.0, num_requests=WARM_UP_REQUESTS, prompt_tokens=prompt_tokens, output_tokens=WARM_UP_TOKENS)
    answers = [Answer(due_s=0.0) for _ in range(WARM_UP_REQUESTS)]
    start = time.perf_counter()
    prompts = [prompt[::-1] for prompt in load.prompts(vocab_size)]  # no prefix of those measured
    bodies = [completion_body(model, prompt, WARM_UP_TOKENS) for prompt in prompts]
    await asyncio.gather(*(ask(server, *pair, WARM_UP_TOKENS, start) for pair in zip(bodies, answers, strict=True)))
    for answer in answers:
        if answer.failure is not None:
            raise StreamError(f"the server at {server.url} did not answer: {answer.failure}")


async def offer(
    server: Server, model: str, served: Served, *, vocab_size: int | None, on_answer: Callable[[], None] | None = None
) -> None:
    """Send every request of a load when it is due, and note its answer in `served`.

    Args:
        model: name in the API.
        served: filled while the load runs, so that it holds what there is if this is cancelled.
        vocab_size: that prompts are folded into; None takes it to be large enough.
        on_answer: called after each request, for a progress bar.
    """
    load = served.load
    bodies = [completion_body(model, prompt, load.output_tokens) for prompt in load.prompts(vocab_size)]
    start = time.perf_counter()

    async def one(body: dict[str, Any], answer: Answer) -> None:
        await asyncio.sleep(max(0.0, start + answer.due_s - time.perf_counter()))
        await ask(server, body, answer, load.output_tokens, start)
        if on_answer is not None:
            on_answer()

    async with asyncio.TaskGroup() as group:
        for body, answer in zip(bodies, served.answers, strict=True):
            group.create_task(one(body, answer))


def completion_body(model: str, prompt: list[int], output_tokens: int) -> dict[str, Any]:
    """A streamed completion with just so many tokens. Token ids are asked for since a token need not have text."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def ask(server: Server, body: dict[str, Any], answer: Answer, output_tokens: int, start: float) -> None:
    """Send one request and note its answer; one that fails is a result too.

    Args:
        start: time.perf_counter() that moments count from.
    """
    answer.sent_s = time.perf_counter() - start
    decoder = msgspec.json.Decoder(Event)
    try:
        async with aclosing(post_events(server, "/v1/completions", body)) as events:
            async for data in events:
                if data != DONE:
                    note(answer, decoder.decode(data), time.perf_counter() - start)
        if answer.num_tokens != output_tokens:
            raise StreamError(f"{answer.num_tokens} tokens came instead of {output_tokens}")
    except (StreamError, msgspec.DecodeError) as exc:
        answer.failure = str(exc)
    answer.done_s = time.perf_counter() - start


def note(answer: Answer, event: Event, now_s: float) -> None:
    """Count the tokens of an event. Raises StreamError if it tells of an error."""
    if event.error is not None:
        message = event.error.get("message") if isinstance(event.error, dict) else None
        raise StreamError(str(message or event.error))
    num_tokens = sum(len(choice.token_ids or ()) for choice in event.choices)
    if num_tokens:
        answer.token_s.append(now_s)
        answer.num_tokens += num_tokens


def served_as_json(served: Served, *, weights: Weights | None, machine: Machine) -> dict[str, Any]:
    """One row of `bench serve --json`. What a server of others weighs is not known, and its bound neither."""
    load, elapsed_s = served.load, served.elapsed_s
    num_prompt_tokens = len(served.complete) * load.prompt_tokens
    num_output_tokens = sum(answer.num_tokens for answer in served.answers)
    bound_s = load_seconds(load, weights, machine) if weights is not None else None
    is_whole = len(served.complete) == load.num_requests

    def per_second(tokens: int) -> float:
        return round(tokens / elapsed_s, 2) if elapsed_s else 0.0

    return {
        "name": load.name,
        "requests": len(served.sent),
        "failed": served.failures.total(),
        "failures": dict(served.failures),
        "unfinished": sum(answer.done_s is None for answer in served.sent),
        "rate": load.rate,
        "offered_rate": None if served.offered_rate is None else round(served.offered_rate, 3),
        "prompt_tokens_each": load.prompt_tokens,
        "output_tokens_each": load.output_tokens,
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "elapsed_s": round(elapsed_s, 4),
        "output_tokens_per_s": per_second(num_output_tokens),
        "total_tokens_per_s": per_second(num_prompt_tokens + num_output_tokens),
        "headline": "output",
        "bound_tokens_per_s": None if bound_s is None else round(load.num_requests * load.output_tokens / bound_s, 2),
        "fraction_of_bound": round(bound_s / elapsed_s, 4) if bound_s is not None and elapsed_s and is_whole else None,
        "ttft_s": percentiles(served.ttft_s),
        "itl_s": percentiles(served.itl_s),
        "latency_s": percentiles(served.latency_s),
    }

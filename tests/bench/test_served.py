from __future__ import annotations

import asyncio
import time

import pytest
from tests.bench.streams import Script, serving

from shardwright.bench.bound import Weights
from shardwright.bench.http_stream import Server, StreamError
from shardwright.bench.load import Load
from shardwright.bench.machine import Machine
from shardwright.bench.served import Answer, Served, ask, offer, read_card, read_status, served_as_json, warm_up
from shardwright.errors import UsageError

MACHINE = Machine(cpu="", cores=2, threads=2, read_gb_per_s=10.0, gemm_gflop_per_s=100.0, gemm_dtype="float32")
WEIGHTS = Weights(num_parameters=1000, num_bytes=2000)


def make_load(*, rate: float = 1000.0, num_requests: int = 6, output_tokens: int = 5) -> Load:
    return Load(rate=rate, num_requests=num_requests, prompt_tokens=4, output_tokens=output_tokens)


async def run(script: Script, load: Load) -> Served:
    served = Served.of(load)
    async with serving(script) as server:
        await offer(server, "scripted", served, vocab_size=50)
    return served


async def test_every_token_of_every_request_is_seen() -> None:
    script = Script(delay_s=0.01)
    served = await run(script, make_load())
    assert len(served.complete) == 6
    assert (len(served.ttft_s), len(served.itl_s), len(served.latency_s)) == (6, 6 * 4, 6)
    assert min(served.itl_s) > 0.003
    assert min(served.latency_s) > 5 * 0.009
    body = script.bodies[0]
    assert (body["model"], body["ignore_eos"], body["stream"], body["temperature"]) == ("scripted", True, True, 0)
    assert len(body["prompt"]) == 4
    assert max(body["prompt"]) < 50
    assert "Authorization: Bearer secret\r\n" in script.heads[0]


async def test_requests_come_when_they_are_due_though_others_are_not_answered() -> None:
    load = make_load(rate=50.0, num_requests=10, output_tokens=2)
    served = await run(Script(delay_s=0.6), load)
    sent = [answer.sent_s for answer in served.answers]
    assert sent == pytest.approx(load.arrivals_s(), abs=0.3)
    assert max(sent) < min(answer.token_s[0] for answer in served.answers)  # type: ignore[type-var]
    assert served.offered_rate == pytest.approx(9 / load.arrivals_s()[-1], rel=0.3)


async def test_several_tokens_of_one_event_are_counted_and_come_at_once() -> None:
    served = await run(Script(tokens_per_event=2), make_load(num_requests=1, output_tokens=5))
    (answer,) = served.complete
    assert (answer.num_tokens, len(answer.token_s)) == (5, 3)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(status=503), "status 503: not today"),
        (Script(cut_after=2), "closed before the answer was complete"),
        (Script(error_after=2), "the engine died"),
    ],
)
async def test_a_request_that_fails_is_counted_with_its_reason(script: Script, reason: str) -> None:
    served = await run(script, make_load(num_requests=3))
    (found,) = served.failures
    assert reason in found
    assert served.failures.total() == 3
    row = served_as_json(served, weights=WEIGHTS, machine=MACHINE)
    assert (row["failed"], row["fraction_of_bound"], row["latency_s"]) == (3, None, None)


async def test_fewer_tokens_than_asked_for_are_a_failure() -> None:
    served = Served.of(make_load(num_requests=1))
    async with serving(Script()) as server:
        body = {"max_tokens": 3, "prompt": [1]}
        await ask(server, body, served.answers[0], 5, time.perf_counter())
    assert served.failures == {"3 tokens came instead of 5": 1}


async def test_what_was_seen_until_a_load_was_ended_stays() -> None:
    served = Served.of(make_load(rate=20.0, num_requests=50, output_tokens=4))
    async with serving(Script(delay_s=0.05)) as server:
        task = asyncio.create_task(offer(server, "scripted", served, vocab_size=None))
        await asyncio.sleep(0.8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    row = served_as_json(served, weights=WEIGHTS, machine=MACHINE)
    assert 0 < len(served.complete) < row["requests"] < 50
    assert row["unfinished"] == row["requests"] - len(served.complete)
    assert row["failed"] == 0
    assert row["output_tokens_per_s"] > 0


async def test_nobody_at_the_address_is_told_before_the_load() -> None:
    async with serving(Script()) as server:
        address = server
    with pytest.raises(StreamError, match="no server answers at http://127"):
        await read_card(address)
    with pytest.raises(UsageError, match="http://127.0.0.1:8000"):
        await read_card(Server("localhost:8000"))


async def test_a_server_of_others_tells_its_model_and_no_more() -> None:
    async with serving(Script()) as server:
        card = await read_card(server)
        assert (card.id, card.max_model_len) == ("scripted", 64)
        assert await read_status(server) is None


async def test_a_server_that_refuses_is_found_out_by_the_warm_up() -> None:
    async with serving(Script(status=400)) as server:
        with pytest.raises(StreamError, match="did not answer: status 400: not today"):
            await warm_up(server, "scripted", prompt_tokens=4, vocab_size=50)


def test_times_count_from_when_a_request_was_due() -> None:
    load = make_load(num_requests=2, output_tokens=3)
    late = Answer(due_s=1.0, sent_s=1.5, token_s=[2.0, 2.25, 2.75], num_tokens=3, done_s=2.8)
    lost = Answer(due_s=2.0, sent_s=2.0, token_s=[2.5], num_tokens=1, done_s=2.6, failure="gone")
    served = Served(load=load, answers=[late, lost])
    assert served.ttft_s == [1.0, 0.5]
    assert served.itl_s == [0.25, 0.5]
    assert served.latency_s == [1.75]
    assert served.offered_rate == 2.0
    row = served_as_json(served, weights=None, machine=MACHINE)
    assert (row["elapsed_s"], row["output_tokens"], row["output_tokens_per_s"]) == (2.75, 4, 1.45)
    assert (row["requests"], row["failed"], row["unfinished"], row["prompt_tokens"]) == (2, 1, 0, 4)
    assert row["bound_tokens_per_s"] is None

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.server.asgi import Connection
from tests.server.fake_engine import AlphabetEngine

from shardwright.engine.messages import SchedulerStats
from shardwright.server import ServerConfig, build_app

pytestmark = pytest.mark.asyncio


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = [line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("shardwright_"): float(value) for name, value in lines}


async def test_tokens_and_latencies_of_requests_are_counted(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"prompt": ["abc", "x"], "max_tokens": 4})
    await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, "stream": True})
    await client.post("/v1/completions", json={"prompt": "a", "stop_token_ids": [ord("c")]})
    values = await scrape(client)
    assert values["prompt_tokens_total"] == 8
    assert values["generation_tokens_total"] == 12
    assert values["time_to_first_token_seconds_count"] == 4
    assert values["inter_token_latency_seconds_count"] == 8
    assert values["e2e_request_latency_seconds_count"] == 4
    assert values['requests_total{finish_reason="length"}'] == 3
    assert values['requests_total{finish_reason="stop"}'] == 1


async def test_state_of_the_engine_is_read_at_every_scrape(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    engine.stats = SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_blocks=32,
        num_free_blocks=8,
        num_preemptions=5,
        num_prefix_query_tokens=100,
        num_prefix_hit_tokens=40,
        num_proposed_tokens=30,
        num_accepted_tokens=20,
        num_restarts=1,
    )
    values = await scrape(client)
    assert values["num_requests_running"] == 3
    assert values["num_requests_waiting"] == 2
    assert values["kv_cache_usage_ratio"] == 0.75
    assert values["preemptions_total"] == 5
    assert values["prefix_cache_queries_total"] == 100
    assert values["prefix_cache_hits_total"] == 40
    assert values["speculative_proposed_tokens_total"] == 30
    assert values["speculative_accepted_tokens_total"] == 20
    assert values["engine_restarts_total"] == 1
    assert values["kv_cache_blocks"] == 32
    assert values["engine_up"] == 1


async def test_replicas_have_values_of_their_own(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    engine.stats = SchedulerStats(num_running=3, num_steps=10, num_blocks=32, num_free_blocks=8)
    engine.other_replicas = [(SchedulerStats(num_running=0, num_steps=20, num_restarts=2), False)]
    values = await scrape(client)
    assert [values[f'num_requests_running{{replica="{i}"}}'] for i in range(2)] == [3, 0]
    assert [values[f'kv_cache_usage_ratio{{replica="{i}"}}'] for i in range(2)] == [0.75, 0]
    assert [values[f'engine_steps_total{{replica="{i}"}}'] for i in range(2)] == [10, 20]
    assert [values[f'engine_restarts_total{{replica="{i}"}}'] for i in range(2)] == [0, 2]
    assert [values[f'engine_up{{replica="{i}"}}'] for i in range(2)] == [1, 0]
    assert "engine_up" not in values


async def test_a_dead_engine_is_not_up(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    engine.is_alive = False
    assert (await scrape(client))["engine_up"] == 0


async def test_requests_that_fail_are_counted_by_why(client: httpx.AsyncClient, engine: AlphabetEngine) -> None:
    await client.post("/v1/completions", json={"prompt": ""})
    engine.dies_after = 1
    await client.post("/v1/completions", json={"prompt": "a"})
    values = await scrape(client)
    assert values['requests_total{finish_reason="rejected"}'] == 1
    assert values['requests_total{finish_reason="error"}'] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_whose_client_left_are_counted_as_aborted(engine: AlphabetEngine, stream: bool) -> None:
    app = build_app(engine, ServerConfig())
    engine.steps = asyncio.Semaphore(1)
    connection = Connection(app, "/v1/completions", {"prompt": "a", "stream": stream})
    while not engine.running:
        await asyncio.sleep(0)
    await connection.disconnect()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        values = await scrape(client)
    assert values['requests_total{finish_reason="abort"}'] == 1


async def test_openmetrics_is_given_to_those_who_ask(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")

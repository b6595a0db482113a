from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import pytest_asyncio
from tests.server.fake_engine import AlphabetEngine

from shardwright.server import ServerConfig, build_app
from shardwright.server.lifecycle import Lifecycle

MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture(autouse=True)
def no_key_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDWRIGHT_API_KEY", raising=False)


@pytest.fixture
def engine() -> AlphabetEngine:
    return AlphabetEngine()


@pytest_asyncio.fixture
async def make_client(engine: AlphabetEngine) -> AsyncIterator[MakeClient]:
    """Makes clients of an app around the engine; keyword arguments are server options."""
    clients: list[httpx.AsyncClient] = []

    def make(*, lifecycle: Lifecycle | None = None, **options: object) -> httpx.AsyncClient:
        app = build_app(engine, ServerConfig(**options), lifecycle=lifecycle)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://server"))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client()

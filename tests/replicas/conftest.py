"""Several services in one process over one store: what a client meets that is sent to any of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import Store
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.store import ValkeyStore
from store import valkey_servers

Fixture = Callable[[str], Any]


def _memory(_: Fixture) -> Callable[[], Store]:
    store = MemoryStore(exclusive=False)
    return lambda: store


def _sqlite(fixture: Fixture) -> Callable[[], Store]:
    path = fixture("tmp_path") / "layers.db"
    return lambda: SqliteStore(path, exclusive=False)


def _valkey(fixture: Fixture) -> Callable[[], Store]:
    server = fixture("valkey")
    valkey_servers.flush([server])
    return lambda: ValkeyStore(server.url)


STORES = {"memory-shared": _memory, "sqlite-shared": _sqlite, "valkey": _valkey}


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey_servers.Server]:
    with valkey_servers.server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(params=STORES)
def make_store(request: pytest.FixtureRequest) -> Callable[[], Store]:
    """Each call makes another store object on the same records."""
    return STORES[request.param](request.getfixturevalue)


@asynccontextmanager
async def running(stores: list[Store], **settings: Any) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client for each of as many services as there are stores."""
    async with AsyncExitStack() as stack:
        clients = []
        for store in stores:
            gateway = create_app(Settings(**settings), store)
            await stack.enter_async_context(gateway.app.router.lifespan_context(gateway.app))
            transport = httpx.ASGITransport(gateway)
            client = httpx.AsyncClient(transport=transport, base_url="http://replica")
            clients.append(await stack.enter_async_context(client))
        yield clients


@pytest.fixture
async def replicas(anyio_backend: str, make_store: Callable[[], Store]) -> AsyncIterator[list[httpx.AsyncClient]]:
    async with running([make_store() for _ in range(3)]) as clients:
        yield clients

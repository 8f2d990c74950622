from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from batchnorm_service.store.base import Store
from store import valkey_servers
from store.harness import MeasuredTable, MemoryTable, Sabotaged, SimulatedTable, SqliteTable, Table, ValkeyTable

Fixture = Callable[[str], Any]
TABLES: dict[str, Callable[[Fixture], Table]] = {
    "memory": lambda _: MemoryTable(exclusive=True),
    "memory-shared": lambda _: MemoryTable(exclusive=False),
    "memory-measured": lambda _: MeasuredTable(),
    "simulated": lambda _: SimulatedTable(embedded=False),
    "simulated-embedded": lambda _: SimulatedTable(embedded=True),
    "sqlite": lambda fixture: SqliteTable(fixture("tmp_path") / "layers.db", exclusive=True),
    "sqlite-shared": lambda fixture: SqliteTable(fixture("tmp_path") / "layers.db", exclusive=False),
    "valkey": lambda fixture: ValkeyTable(fixture("valkey_server")),
    "valkey-cluster": lambda fixture: ValkeyTable(fixture("valkey_cluster")),
    "valkey-cluster-wait": lambda fixture: ValkeyTable(fixture("valkey_cluster"), wait_replicas=1),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey_servers.Server]:
    with valkey_servers.server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey_servers.Cluster]:
    with valkey_servers.cluster(tmp_path_factory.mktemp("cluster"), node_timeout=10_000) as cluster:
        yield cluster


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Table:
    return TABLES[request.param](request.getfixturevalue)


@pytest.fixture
async def store(anyio_backend: str, table: Table) -> AsyncIterator[Store]:
    store = table.store()
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> type[Sabotaged]:
    """Let every SQLite connection from now on be one that the test can get in before."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Sabotaged, **kwargs))
    monkeypatch.setattr(Sabotaged, "before", None)
    return Sabotaged

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from batchnorm_service.store.base import Store
from store.harness import MemoryTable, Sabotaged, SqliteTable, Table

TABLES: dict[str, Callable[[Path], Table]] = {
    "memory": lambda _: MemoryTable(exclusive=True),
    "memory-shared": lambda _: MemoryTable(exclusive=False),
    "sqlite": lambda path: SqliteTable(path / "layers.db", exclusive=True),
    "sqlite-shared": lambda path: SqliteTable(path / "layers.db", exclusive=False),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    return TABLES[request.param](tmp_path)


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

"""What a store brings to the conformance suite: a table that stores are opened on, and a way to let time pass.

A new store joins with one subclass of `Table` and one line in `conftest.py`.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import Exists, Full, Receipt, Record, Store
from batchnorm_service.store.measured import measured
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.store import ValkeyStore
from batchnorm_service.telemetry import NoMetrics
from simulation.embedded import EmbeddedStore
from simulation.faults import Faults
from simulation.runtimes import ServiceRuntime
from simulation.store import Server as SimulatedServer
from simulation.store import SimulatedStore
from store.valkey_servers import Cluster, Server, flush, let_pass

RECEIPT_SECONDS = 3600.0
LIMIT = 1_000_000


class Clocks(Runtime):
    """A runtime with clocks of a test's.

    Args:
        wall: seconds since 1970; the machine's by default.
        now: seconds of a clock that never goes back.
    """

    def __init__(self, wall: Callable[[], float] = RUNTIME.wall, now: Callable[[], float] = RUNTIME.now) -> None:
        self._wall = wall
        self._now = now

    def wall(self) -> float:
        return self._wall()

    def now(self) -> float:
        return self._now()


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.25

    def __call__(self) -> float:
        return self.now


class Sabotaged(sqlite3.Connection):
    """A connection on which a test can get in before each statement."""

    before: Callable[[sqlite3.Connection, str], None] | None = None

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:  # type: ignore[override]
        if Sabotaged.before is not None:
            Sabotaged.before(self, sql)
        return super().execute(sql, parameters)


class Table(ABC):
    """One table of records.

    Attributes:
        shared: several stores may be open on it at once.
        tells_contenders: a commit that wins is told how many have lost.
    """

    shared = True
    tells_contenders = True

    @abstractmethod
    def store(self) -> Store:
        """Return a store on this table, not yet open."""

    @abstractmethod
    def forward(self, seconds: float) -> None:
        """Let that much time pass, as receipts see it."""


class MemoryTable(Table):
    def __init__(self, *, exclusive: bool) -> None:
        self.shared = not exclusive
        self._clock = Clock()
        self._store = MemoryStore(RECEIPT_SECONDS, exclusive, Clocks(wall=self._clock))

    def store(self) -> Store:
        return self._store

    def forward(self, seconds: float) -> None:
        self._clock.now += seconds


class MeasuredTable(MemoryTable):
    """A store whose operations are reported to metrics."""

    def __init__(self) -> None:
        super().__init__(exclusive=False)

    def store(self) -> Store:
        return measured(super().store(), NoMetrics())


class SimulatedTable(Table):
    """A store of the simulated world, without its faults."""

    def __init__(self, *, embedded: bool) -> None:
        self.shared = not embedded
        self._clock = Clock()
        calm = {field.name: 0.0 for field in fields(Faults)} | {"latency": 1e-5}
        self._random, self._faults = Random(0), Faults(**calm)
        self._server = SimulatedServer(self._random, self._faults, RECEIPT_SECONDS, Clocks(wall=self._clock))

    def store(self) -> Store:
        if self.shared:
            return SimulatedStore(self._server, self._random, self._faults)
        return EmbeddedStore(self._server, self._random, self._faults, ServiceRuntime(self._random))

    def forward(self, seconds: float) -> None:
        self._clock.now += seconds


class SqliteTable(Table):
    tells_contenders = False  # counting would be a write, and a write a disk flush

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.shared = not exclusive
        self._path = path
        self._clock = Clock()

    def store(self) -> SqliteStore:
        return SqliteStore(self._path, RECEIPT_SECONDS, not self.shared, runtime=Clocks(wall=self._clock))

    def forward(self, seconds: float) -> None:
        self._clock.now += seconds


class ValkeyTable(Table):
    """The servers' clocks cannot be moved: what would expire later is made to do so earlier."""

    def __init__(self, servers: Server | Cluster, *, wait_replicas: int = 0) -> None:
        self._url = servers.url
        self._primaries = servers.primaries() if isinstance(servers, Cluster) else [servers]
        self._wait_replicas = wait_replicas
        flush(self._primaries)

    def store(self) -> ValkeyStore:
        return ValkeyStore(self._url, RECEIPT_SECONDS, timeout=30, wait_replicas=self._wait_replicas, wait_timeout=30)

    def forward(self, seconds: float) -> None:
        let_pass(self._primaries, seconds)


def receipt(version: int = 2, batch: int = 1) -> Receipt:
    return Receipt(
        secrets.token_bytes(16), secrets.token_bytes(16), version, batch, secrets.token_bytes(version % 3 * 20)
    )


def after(record: Record, data: bytes) -> Record:
    """Return the record that follows."""
    return Record(record.stamp.next(RUNTIME.bits(63)), data)


async def created(store: Store, name: str, data: bytes = b"first") -> Record:
    answer = await store.create(name, data, LIMIT)
    assert not isinstance(answer, Exists | Full)
    return answer


async def loaded(store: Store, name: str) -> Record:
    answer = await store.load(name)
    assert isinstance(answer, Record)
    return answer


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start one of the programs in `programs/`, in a process that imports what this one does."""
    script = Path(__file__).parent / "programs" / f"{program}.py"
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

"""A replica's embedded store as SQLite's is: the real thread with its queue and group commit, over a simulated file.

What `SqliteThread` is given is simulated: a connection whose transactions are on the server's table, take time, and
fail where the disk is full. A kill comes at any moment, also in the middle of a transaction: then it is on disk or not,
and nobody is told.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any

from batchnorm_service.store.base import Committed, Receipt, Record, Stamp, StoreError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.table import Commit
from batchnorm_service.store.sqlite.thread import Job, SqliteThread
from simulation.faults import Faults
from simulation.runtimes import ServiceRuntime
from simulation.store import Applied, Server, SimulatedStore

Work = Callable[[MemoryStore], Coroutine[Any, Any, Any]]


class EmbeddedStore(SimulatedStore):
    """A `SimulatedStore` whose calls pass through a `SqliteThread`.

    Args:
        server: its table is the file; what was written is noted there.
        random: the world's.
        faults: how often what goes wrong.
        runtime: of the process; makes the thread.
    """

    def __init__(self, server: Server, random: Random, faults: Faults, runtime: ServiceRuntime) -> None:
        super().__init__(server, random, faults, exclusive=True)
        self._runtime = runtime
        self._file = _Connection(server, random, faults, runtime)
        self._thread: SqliteThread | None = None

    async def open(self) -> None:
        await self._server.table.open()
        commits: Any = self._commits
        connect: Any = lambda: self._file  # noqa: E731
        self._thread = SqliteThread(connect, commits, lambda *_: None, lambda _: None, self._runtime)
        await asyncio.wrap_future(self._thread.start())

    async def close(self) -> None:
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await asyncio.wrap_future(thread.stop())

    def kill(self) -> None:
        """The process is killed."""
        self._file.abandon()
        self._runtime.kill_thread()

    async def _write(self, name: str, work: Work, receipts: Sequence[Receipt] = ()) -> Any:
        return await self._submit(Job(name, True, lambda _: self._file.run(name, work, receipts)))

    async def _read(self, work: Work) -> Any:
        return await self._submit(Job(None, False, lambda _: _done(work(self._server.table))))

    async def load(self, name: str, unless: Any = None) -> Any:
        work: Any = lambda _: _done(self._server.table.load(name, unless))  # noqa: E731
        return await self._submit(Job(name, False, work))

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt], keep: int = 0
    ) -> Any:
        return await self._submit(Job(name, True, Commit(name, expected, record, receipts, keep)))

    async def _submit(self, job: Job[Any]) -> Any:
        if self._thread is None:
            raise StoreError("the store is not open")
        return await self._thread.submit(job)

    def _commits(self, _: Any, commits: Sequence[Commit]) -> list[Any]:
        return [
            self._file.run(each.name, lambda table, each=each: table.commit(*each), each.receipts)  # type: ignore[misc]
            for each in commits
        ]


class _Connection:
    """Transactions on the server's table, as `SqliteThread` makes them."""

    def __init__(self, server: Server, random: Random, faults: Faults, runtime: ServiceRuntime) -> None:
        self._server = server
        self._random = random
        self._faults = faults
        self._runtime = runtime
        self._before: dict[str, Any] = {}
        self._done: list[tuple[Any, ...]] = []
        self._noted: list[Any] = []
        self.in_transaction = False
        self.total_changes = 0

    def execute(self, statement: str) -> _Connection:
        if self._runtime.thread_is_killed:
            return self
        match statement.split(maxsplit=1)[0]:
            case "BEGIN":
                self._before, self._done, self.in_transaction = self._server.content(), [], True
            case "COMMIT":
                if self._done:
                    self._runtime.pause_thread(self._sync())
                    self._maybe_full()
                    self._note()
                    self._runtime.pause_thread(self._sync())
                    self._settle()
                self.in_transaction = False
            case "ROLLBACK":
                self._roll_back()
        return self

    def run(self, name: str, work: Work, receipts: Sequence[Receipt]) -> Any:
        """Do a write in the transaction."""
        self._maybe_full()
        if self._random.random() < self._faults.disk_full / 4:
            raise sqlite3.IntegrityError("this call's values")
        before = self._server.table._records.get(name)
        reply = _done(work(self._server.table))
        after = self._server.table._records.get(name)
        written = tuple(receipts) if isinstance(reply, Committed) else ()
        self._done.append((name, before, after, written, self._server.pins(name)))
        self.total_changes += 1
        return reply

    def abandon(self) -> None:
        """The process is killed: a transaction that is under way was durable already, or never will be."""
        if self.in_transaction and self._done:
            if self._random.random() < 0.5:
                self._note()
            else:
                self._roll_back()
        self._settle()

    def fetchall(self) -> list[Any]:
        return []

    def close(self) -> None: ...

    def _note(self) -> None:
        """The transaction is durable."""
        at = self._server.now()
        for name, before, after, written, pins in self._done:
            if after is not before or written:
                self._server.log.append(Applied(at, name, before, after, written))
                self._noted.append(self._server.note(name, after))
            if (unpinned := self._server.note_pins(name, pins)) is not None:
                self._noted.append(unpinned)
        self._done = []

    def _settle(self) -> None:
        """Those who wait for the transaction are told: from now on nobody may believe what it replaced."""
        for overtaken in self._noted:
            overtaken.until = min(overtaken.until, self._server.now())
        self._noted = []

    def _roll_back(self) -> None:
        self._server.restore(self._before)
        self._done, self.in_transaction = [], False

    def _sync(self) -> float:
        return self._random.expovariate(1 / self._faults.sync) if self._faults.sync else 0.0

    def _maybe_full(self) -> None:
        if self._random.random() < self._faults.disk_full:
            raise sqlite3.OperationalError("database or disk is full")


def _done(call: Coroutine[Any, Any, Any]) -> Any:
    """The result of a call of the table, which never waits."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    except StoreError as error:
        raise sqlite3.OperationalError(str(error)) from error
    raise AssertionError("the table waits")

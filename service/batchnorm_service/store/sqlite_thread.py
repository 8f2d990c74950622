"""The one thread that talks to SQLite, and the group commit: what waits at the same moment shares one transaction."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

from batchnorm_service.store.base import StoreError

T = TypeVar("T")

_DRAIN: Final = 1024  # jobs in one round, so that a read never waits for an endless row of writes
# What SQLite or its binding says of the values it is given. Anything else (disk, lock, I/O) concerns every waiter.
_OWN_FAULTS: Final = (
    ValueError,
    OverflowError,
    TypeError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """Something to do with the database.

    Attributes:
        name: the layer that it reads or writes; None: any of them.
        writes: whether it may write, and so waits for a COMMIT before it is answered.
        work: what to do, inside a transaction.
        answer: what came of it: the value, or `StoreError`.
    """

    name: str | None
    writes: bool
    work: Callable[[sqlite3.Connection], T]
    answer: Future[T] = field(default_factory=Future)


class _FaultError(Exception):
    """One job of a group cannot be done whatever the state of the database: the others go on without it."""

    def __init__(self, position: int, reason: Exception) -> None:
        super().__init__(position, reason)
        self.position = position
        self.reason = reason


class SqliteThread:
    """A connection and the only thread that uses it.

    Writes are answered after their COMMIT. Reads see committed data only: a read is answered at once unless a write
    of the same layer waits before it, so that the order in which calls were made is never turned around.

    Args:
        connect: opens the connection; runs in the thread.
        before_commit: called inside each transaction that wrote, with the number of rows that were changed.

    Attributes:
        transactions: how many write transactions were committed.
    """

    def __init__(
        self, connect: Callable[[], sqlite3.Connection], before_commit: Callable[[sqlite3.Connection, int], None]
    ) -> None:
        self.transactions = 0
        self._connect = connect
        self._before_commit = before_commit
        self._queue: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._opened: Future[None] = Future()
        self._closed: Future[None] = Future()
        self._gate = threading.Lock()  # nothing is queued behind the None that ends the thread
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def start(self) -> Future[None]:
        """Start the thread. The future is done when the connection is open, or holds what `connect` raised."""
        # A caller that stops waiting must not cancel what the thread is to answer.
        self._opened.set_running_or_notify_cancel()
        self._closed.set_running_or_notify_cancel()
        # A daemon: a program that forgets to close must still be able to end, and nothing acknowledged is lost.
        threading.Thread(target=self._run, name="batchnorm-sqlite", daemon=True).start()
        return self._opened

    def submit(self, job: Job[T]) -> Future[T]:
        """Queue a job. Raises `StoreError` after `stop`."""
        with self._gate:
            if self._stopped:
                raise StoreError("the SQLite store is closed")
            self._queue.put(job)
        return job.answer

    def stop(self) -> Future[None]:
        """Do what is queued, then close the connection. May be called again: the future is the same."""
        with self._gate:
            if not self._stopped:
                self._stopped = True
                self._queue.put(None)
        return self._closed

    def _run(self) -> None:
        try:
            connection = self._connect()
        except Exception as error:
            self._opened.set_exception(error)
            self._closed.set_result(None)
            return
        self._opened.set_result(None)
        try:
            while self._round(connection):
                pass
            with contextlib.suppress(sqlite3.Error):  # what is not copied back stays in the log, which is as durable
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            try:
                connection.close()
            finally:
                self._closed.set_result(None)

    def _round(self, connection: sqlite3.Connection) -> bool:
        """Answer all that waits; False when that was the last. A method, so that no job outlives its round."""
        waiting = [self._queue.get()]
        while len(waiting) < _DRAIN and not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        # Those that were cancelled before they began are left out; from here on cancelling has no effect on them.
        jobs = [job for job in waiting if job is not None and job.answer.set_running_or_notify_cancel()]
        written: set[str | None] = set()
        first: list[Job[Any]] = []
        writes: list[Job[Any]] = []
        last: list[Job[Any]] = []
        for job in jobs:
            if job.writes:
                writes.append(job)
                written.add(job.name)
            else:
                (last if job.name in written or (job.name is None and written) else first).append(job)
        for job in first:
            self._read(connection, job)
        self._write(connection, writes)
        for job in last:
            self._read(connection, job)
        return waiting[-1] is not None

    def _read(self, connection: sqlite3.Connection, job: Job[Any]) -> None:
        try:
            value = _transact(connection, "BEGIN", job.work)
        except Exception as error:  # whatever it is, the caller must not wait forever
            _fail([job], error)
        else:
            job.answer.set_result(value)

    def _write(self, connection: sqlite3.Connection, jobs: list[Job[Any]]) -> None:
        while jobs:
            try:
                values = _transact(connection, "BEGIN IMMEDIATE", partial(self._group, jobs))
            except _FaultError as fault:
                _fail([jobs[fault.position]], fault.reason)
                jobs = jobs[: fault.position] + jobs[fault.position + 1 :]
            except Exception as error:
                _fail(jobs, error)
                return
            else:
                self.transactions += 1
                for job, value in zip(jobs, values, strict=True):
                    job.answer.set_result(value)
                return

    def _group(self, jobs: Sequence[Job[Any]], connection: sqlite3.Connection) -> list[Any]:
        before = connection.total_changes
        values = []
        for position, job in enumerate(jobs):
            try:
                values.append(job.work(connection))
            except _OWN_FAULTS as error:
                raise _FaultError(position, error) from error
        if changes := connection.total_changes - before:
            self._before_commit(connection, changes)
        return values


def _transact(connection: sqlite3.Connection, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
    """Do `work` in a transaction that is committed; when anything fails, in none at all."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")  # the one below failed: try again before anyone sees what was never committed
    try:
        connection.execute(begin)
        value = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise
    return value


def _fail(jobs: Sequence[Job[Any]], reason: Exception) -> None:
    for job in jobs:  # each its own exception: a shared one would gather the tracebacks of all who raise it
        error = StoreError(f"SQLite: {reason}")
        error.__cause__ = reason
        job.answer.set_exception(error)

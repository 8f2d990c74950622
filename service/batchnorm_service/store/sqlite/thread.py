"""The one thread that talks to SQLite, and the group commit: what waits at the same moment shares one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.sqlite.table import Commit

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


@dataclass(frozen=True, slots=True, eq=False)
class Job(Generic[T]):
    """Something to do with the database.

    Attributes:
        name: the layer that it reads or writes; None: any of them.
        writes: whether it may write, and so waits for a COMMIT before it is answered.
        work: what to do, inside a transaction; or a `Commit`, which is done together with others.
        answer: what came of it: the value, or `StoreError`.
    """

    name: str | None
    writes: bool
    work: Callable[[sqlite3.Connection], T] | Commit
    answer: asyncio.Future[T] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _FaultError(Exception):
    """Some jobs of a group cannot be done whatever the state of the database: the others go on without them."""

    def __init__(self, run: Sequence[Job[Any]], reason: Exception) -> None:
        super().__init__(run, reason)
        self.run = run
        self.reason = reason


class SqliteThread:
    """A connection and the only thread that uses it.

    Writes are answered after their COMMIT. Reads see committed data only: a read is answered at once unless a write
    of the same layer waits before it, so that the order in which calls were made is never turned around.

    Args:
        connect: opens the connection; runs in the thread.
        commit: does several commits, no two of one name.
        before_commit: called inside each transaction that wrote, with the number of rows that were changed.
        verify: called before each round, and before the answers to writes: raises `StoreError` where none may be given.
        runtime: starts the thread.

    Attributes:
        transactions: how many write transactions were committed.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        commit: Callable[[sqlite3.Connection, Sequence[Commit]], list[Any]],
        before_commit: Callable[[sqlite3.Connection, int], None],
        verify: Callable[[sqlite3.Connection], None],
        runtime: Runtime,
    ) -> None:
        self._runtime = runtime
        self.transactions = 0
        self._connect = connect
        self._commit = commit
        self._before_commit = before_commit
        self._verify = verify
        self._submitted: list[Job[Any]] = []
        self._queue: SimpleQueue[list[Job[Any]] | None] = SimpleQueue()
        self._opened: Future[None] = Future()
        self._closed: Future[None] = Future()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def start(self) -> Future[None]:
        """Start the thread, for the running loop. The future is done when the connection is open, or holds why not."""
        self._loop = asyncio.get_running_loop()
        # A caller that stops waiting must not cancel what the thread is to answer.
        self._opened.set_running_or_notify_cancel()
        self._closed.set_running_or_notify_cancel()
        # A daemon: a program that forgets to close must still be able to end, and nothing acknowledged is lost.
        self._runtime.thread(self._run, "batchnorm-sqlite")
        return self._opened

    def submit(self, job: Job[T]) -> asyncio.Future[T]:
        """Queue a job. Raises `StoreError` after `stop`.

        The thread hears of it after this turn of the event loop, with whatever else is submitted in it: woken by the
        first job of many, it would begin a transaction for that one alone, and one thread would interrupt the other.
        """
        if self._stopped:
            raise StoreError("the SQLite store is closed")
        if not self._submitted:
            self._loop.call_soon(self._hand_over)
        self._submitted.append(job)
        return job.answer

    def stop(self) -> Future[None]:
        """Do what is queued, then close the connection. May be called again: the future is the same."""
        if not self._stopped:
            self._stopped = True
            self._hand_over()
            self._queue.put(None)
        return self._closed

    def _hand_over(self) -> None:
        if self._submitted:
            self._queue.put(self._submitted)
            self._submitted = []

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
            # What is not copied back stays in the log, which is as durable.
            with contextlib.suppress(sqlite3.Error, StoreError):
                self._verify(connection)
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            try:
                connection.close()
            finally:
                self._closed.set_result(None)

    def _round(self, connection: sqlite3.Connection) -> bool:
        """Answer all that waits; False when that was the last. A method, so that no job outlives its round."""
        waiting = self._queue.get()
        while waiting is not None and len(waiting) < _DRAIN and not self._queue.empty():
            more = self._queue.get_nowait()
            if more is None:
                self._queue.put(None)  # nothing comes behind it
                break
            waiting += more
        # Those that were cancelled before they began are left out; from here on cancelling has no effect on them.
        jobs = [job for job in waiting or () if not job.answer.cancelled()]
        try:
            self._verify(connection)
        except StoreError as error:
            self._fail(jobs, error)
            return waiting is not None
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
        self._read(connection, first)
        self._write(connection, writes)
        self._read(connection, last)
        return waiting is not None

    def _read(self, connection: sqlite3.Connection, jobs: Sequence[Job[Any]]) -> None:
        for job in jobs:
            try:
                (value,) = _transact(connection, "BEGIN", partial(self._work, [job]))
            except Exception as error:  # whatever it is, the caller must not wait forever
                self._fail([job], error)
            else:
                self._answer([(job.answer, value)])

    def _write(self, connection: sqlite3.Connection, jobs: Sequence[Job[Any]]) -> None:
        together = True
        while jobs:
            runs = _runs(jobs) if together else [[job] for job in jobs]
            try:
                values = _transact(connection, "BEGIN IMMEDIATE", partial(self._group, runs))
                self._verify(connection)
            except _FaultError as fault:
                if len(fault.run) > 1:
                    together = False  # to find out which of them it is
                    continue
                self._fail(fault.run, fault.reason)
                jobs = [job for job in jobs if job is not fault.run[0]]
            except Exception as error:
                self._fail(jobs, error)
                return
            else:
                self.transactions += 1
                self._answer([(job.answer, value) for job, value in zip(jobs, values, strict=True)])
                return

    def _group(self, runs: Sequence[Sequence[Job[Any]]], connection: sqlite3.Connection) -> list[Any]:
        before = connection.total_changes
        values: list[Any] = []
        for run in runs:
            try:
                values += self._work(run, connection)
            except _OWN_FAULTS as error:
                raise _FaultError(run, error) from error
        if changes := connection.total_changes - before:
            self._before_commit(connection, changes)
        return values

    def _work(self, run: Sequence[Job[Any]], connection: sqlite3.Connection) -> list[Any]:
        if commits := [job.work for job in run if isinstance(job.work, Commit)]:
            return self._commit(connection, commits)
        return [job.work(connection) for job in run if callable(job.work)]

    def _answer(self, answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        """Hand the answers over, all at once: waking the event loop costs more than most of them did."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, answers)

    def _fail(self, jobs: Sequence[Job[Any]], reason: Exception) -> None:
        answers = []
        for job in jobs:  # each its own exception: a shared one would gather the tracebacks of all who raise it
            error = type(reason)(*reason.args) if isinstance(reason, StoreError) else StoreError(f"SQLite: {reason}")
            error.__cause__ = reason
            answers.append((job.answer, error))
        self._answer(answers)


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


def _runs(jobs: Sequence[Job[Any]]) -> list[list[Job[Any]]]:
    """The jobs in their order, those commits together that follow each other and are of different layers."""
    runs: list[list[Job[Any]]] = []
    names: set[str | None] = set()
    for job in jobs:
        if isinstance(job.work, Commit) and names and job.name not in names:
            runs[-1].append(job)
            names.add(job.name)
        else:
            runs.append([job])
            names = {job.name} if isinstance(job.work, Commit) else set()
    return runs


def _settle(answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in answers:
        if future.done():  # cancelled: nobody waits for this one
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

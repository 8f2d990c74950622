"""The thread that uses SQLite, with group commit: queued writes share one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.sqlite.copies import CopyProgress, copy_database
from batchnorm_service.store.sqlite.table import Commit

T = TypeVar("T")

_MAX_JOBS: Final = 1024  # in one round, so that reads do not starve
# Exceptions that are caused by a job's own values. All others (disk, lock, I/O) concern every queued job.
_JOB_ERRORS: Final = (
    ValueError,
    OverflowError,
    TypeError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the database, made while other jobs go on. See `copy_database`."""

    partial: Path
    mode: int
    progress: CopyProgress


@dataclass(frozen=True, slots=True, eq=False)
class Job(Generic[T]):
    """A database operation and the future of its result.

    Attributes:
        name: the layer that it reads or writes; None for any.
        writes: whether it may write; then its future is completed after the COMMIT.
        work: the operation, run inside a transaction; or a `Commit`, which is combined with others; or a `Copy`.
        future: the result, or a `StoreError`.
    """

    name: str | None
    writes: bool
    work: Callable[[sqlite3.Connection], T] | Commit | Copy
    future: asyncio.Future[T] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _JobError(Exception):
    """A run of jobs failed because of its own values: the other jobs of the transaction can be done without it."""

    def __init__(self, run: Sequence[Job[Any]], reason: Exception) -> None:
        super().__init__(run, reason)
        self.run = run
        self.reason = reason


class SqliteThread:
    """A connection and the thread that uses it.

    The thread works in rounds: it takes all queued jobs, and does reads, then writes in one transaction, then the reads
    that were queued after a write of the same layer. So jobs on one layer take effect in order, and reads see committed
    data only. A copy of the database is made in small steps, with rounds in between.

    Args:
        connect: opens the connection; runs in the thread.
        commit: does several commits, of different names.
        before_commit: called inside each transaction that wrote, with the number of changed rows.
        verify: called before each round, and before writes are acknowledged; raises `StoreError` to fail the jobs.
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
        self._queue: SimpleQueue[list[Job[Any]] | None] = runtime.queue()
        self._opened: Future[None] = Future()
        self._closed: Future[None] = Future()
        self._stopped = False
        self._copying = False

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def start(self) -> Future[None]:
        """Start the thread for the running event loop. The future completes when the connection is open or refused."""
        self._loop = asyncio.get_running_loop()
        # Cancelling the caller must not cancel these futures, which the thread completes.
        self._opened.set_running_or_notify_cancel()
        self._closed.set_running_or_notify_cancel()
        # A daemon thread: a program that forgets to close the store can end, and no acknowledged commit is lost.
        self._runtime.thread(self._run, "batchnorm-sqlite")
        return self._opened

    def submit(self, job: Job[T]) -> asyncio.Future[T]:
        """Queue a job. Raises `StoreError` after `stop`.

        Jobs are passed to the thread after this iteration of the event loop, together with all others submitted in it.
        Otherwise the first of many jobs would get a transaction of its own.
        """
        if self._stopped:
            raise StoreError("the SQLite store is closed")
        if not self._submitted:
            self._loop.call_soon(self._flush)
        self._submitted.append(job)
        return job.future

    def stop(self) -> Future[None]:
        """Do the queued jobs, then close the connection. Idempotent: returns the same future."""
        if not self._stopped:
            self._stopped = True
            self._flush()
            self._queue.put(None)
        return self._closed

    def _flush(self) -> None:
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
            # If the checkpoint fails, the data remains in the log, which is durable too.
            with contextlib.suppress(sqlite3.Error, StoreError):
                self._verify(connection)
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            try:
                connection.close()
            finally:
                self._closed.set_result(None)

    def _round(self, connection: sqlite3.Connection) -> bool:
        """Do all queued jobs; False after the last. A method of its own, so that no local variable keeps jobs alive."""
        return self._do(connection, self._queue.get())

    def _do(self, connection: sqlite3.Connection, waiting: list[Job[Any]] | None) -> bool:
        while waiting is not None and len(waiting) < _MAX_JOBS and not self._queue.empty():
            more = self._queue.get_nowait()
            if more is None:
                self._queue.put(None)  # None is the last item: put it back for the next round
                break
            waiting += more
        # Jobs that were cancelled while queued are skipped; from here on, cancelling has no effect.
        jobs = [job for job in waiting or () if not job.future.cancelled()]
        try:
            self._verify(connection)
        except StoreError as error:
            self._fail(jobs, error)
            return waiting is not None
        written: set[str | None] = set()
        first: list[Job[Any]] = []
        writes: list[Job[Any]] = []
        last: list[Job[Any]] = []
        copies: list[Job[Any]] = []
        for job in jobs:
            if isinstance(job.work, Copy):
                copies.append(job)
            elif job.writes:
                writes.append(job)
                written.add(job.name)
            else:
                (last if job.name in written or (job.name is None and written) else first).append(job)
        self._read(connection, first)
        self._write(connection, writes)
        self._read(connection, last)
        for job in copies:
            self._copy(connection, job)
        return waiting is not None

    def _copy(self, connection: sqlite3.Connection, job: Job[Any]) -> None:
        copy = job.work
        assert isinstance(copy, Copy)  # noqa: S101 - see `_do`
        if self._copying:
            self._fail([job], StoreError("a copy is being made already"))
            return

        def between_steps(done: int, total: int) -> None:
            copy.progress(done, total)
            with contextlib.suppress(Empty):
                if not self._do(connection, self._queue.get_nowait()):
                    self._queue.put(None)  # it is for `_run`
                    raise StoreError("the store is being closed")

        self._copying = True
        try:
            copy_database(connection, copy.partial, copy.mode, between_steps)
        except Exception as error:
            self._fail([job], error)
        else:
            self._complete([(job.future, None)])
        finally:
            self._copying = False

    def _read(self, connection: sqlite3.Connection, jobs: Sequence[Job[Any]]) -> None:
        for job in jobs:
            try:
                (value,) = _transact(connection, "BEGIN", partial(self._work, [job]))
            except Exception as error:  # any error, so that the caller does not wait forever
                self._fail([job], error)
            else:
                self._complete([(job.future, value)])

    def _write(self, connection: sqlite3.Connection, jobs: Sequence[Job[Any]]) -> None:
        together = True
        while jobs:
            runs = _runs(jobs) if together else [[job] for job in jobs]
            try:
                values = _transact(connection, "BEGIN IMMEDIATE", partial(self._group, runs))
                self._verify(connection)
            except _JobError as fault:
                if len(fault.run) > 1:
                    together = False  # find out which job it is
                    continue
                self._fail(fault.run, fault.reason)
                jobs = [job for job in jobs if job is not fault.run[0]]
            except Exception as error:
                self._fail(jobs, error)
                return
            else:
                self.transactions += 1
                self._complete([(job.future, value) for job, value in zip(jobs, values, strict=True)])
                return

    def _group(self, runs: Sequence[Sequence[Job[Any]]], connection: sqlite3.Connection) -> list[Any]:
        before = connection.total_changes
        values: list[Any] = []
        for run in runs:
            try:
                values += self._work(run, connection)
            except _JOB_ERRORS as error:
                raise _JobError(run, error) from error
        if changes := connection.total_changes - before:
            self._before_commit(connection, changes)
        return values

    def _work(self, run: Sequence[Job[Any]], connection: sqlite3.Connection) -> list[Any]:
        if commits := [job.work for job in run if isinstance(job.work, Commit)]:
            return self._commit(connection, commits)
        return [job.work(connection) for job in run if callable(job.work)]

    def _complete(self, results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        """Complete futures, all at once: waking the event loop costs more than most jobs."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(_set_results, results)

    def _fail(self, jobs: Sequence[Job[Any]], reason: Exception) -> None:
        results = []
        for job in jobs:  # each its own exception: a shared one would accumulate the tracebacks of all callers
            error = type(reason)(*reason.args) if isinstance(reason, StoreError) else StoreError(f"SQLite: {reason}")
            error.__cause__ = reason
            results.append((job.future, error))
        self._complete(results)


def _transact(connection: sqlite3.Connection, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
    """Do `work` in a transaction; roll back if anything fails."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")  # an earlier rollback failed: retry, or reads would see uncommitted data
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
    """The jobs in order, with consecutive commits of different layers grouped into one run."""
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


def _set_results(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in results:
        if future.done():  # cancelled
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

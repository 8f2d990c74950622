"""The default store: an SQLite file. Acknowledged commits are on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import (
    Attachment,
    Committed,
    Conflict,
    Duplicates,
    Entry,
    Exists,
    Full,
    GroupStatus,
    Missing,
    NotKept,
    Pin,
    Pinned,
    Receipt,
    ReceiptWithTTL,
    Record,
    Shard,
    Stamp,
    StoreError,
    StoreLostError,
    StoreOptions,
    Unchanged,
)
from batchnorm_service.store.sqlite import attachments, history
from batchnorm_service.store.sqlite.backup_socket import BackupSocket
from batchnorm_service.store.sqlite.copies import CopyProgress
from batchnorm_service.store.sqlite.file import open_file
from batchnorm_service.store.sqlite.identity import SqliteFiles
from batchnorm_service.store.sqlite.table import Commit, SqliteTable
from batchnorm_service.store.sqlite.thread import Copy, Job, SqliteThread
from batchnorm_service.store.sqlite.url import path_of

T = TypeVar("T")

_PAGE = 1000


class SqliteStore:
    """Table of records in an SQLite file.

    The file is in WAL mode with `synchronous=FULL`: an acknowledged commit survives a power failure. Queued writes
    share one transaction (`SqliteThread`), because a disk flush costs the same for one as for many. A failed
    transaction (such as disk full) does not affect the next one.

    Args:
        path: the file; it and its parent directories are created if missing.
        receipt_seconds: time to live of receipts, rounded up to a whole second.
        exclusive: lock the file until `close`, so that no other process can open it. False allows several processes
            to use the file; their commits are ordered by the stamps.
        busy_seconds: how long a call waits for another process's transaction (`exclusive=False`).
        check_bytes: a file up to this size is checked for damage at `open`.
        runtime: clocks and random numbers.

    Attributes:
        path: the file, absolute, with symbolic links resolved.
        files: the identity check of the open files. Once they were deleted, moved or replaced, every call raises
            `StoreLostError` until the store is opened again. `ping` always checks, other calls if the last check is
            older than a second; a commit is acknowledged only after such a check.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        receipt_seconds: float = 3600.0,
        exclusive: bool = True,
        *,
        busy_seconds: float = 5.0,
        check_bytes: int = 0,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.exclusive = self._locks = exclusive
        self.path = Path(os.path.realpath(path))
        self.url = f"sqlite:///{quote(self.path.as_posix(), safe='/:')}"
        self.files = SqliteFiles(self.path, Path(path).absolute(), shared=not exclusive, runtime=runtime)
        self._table = SqliteTable(receipt_seconds, runtime)
        self._check_bytes = check_bytes
        self._backups = BackupSocket(self.path, self.copy, runtime)
        self._busy_seconds = 0.0 if exclusive else busy_seconds
        self._runtime = runtime
        self._thread: SqliteThread | None = None

    @property
    def transactions(self) -> int:
        """How many write transactions were committed since `open`; with group commit, fewer than commits."""
        return 0 if self._thread is None else self._thread.transactions

    async def open(self) -> None:
        """Open or create the file. If it is locked, offer backups to other processes. Raises `StoreRefusedError`."""
        if self._thread is not None and not self._thread.stopped:
            raise StoreError(f"{self.path} is open already")
        await self.close()  # a thread that is still closing the file has it locked
        self.exclusive = self._locks
        thread = SqliteThread(self._connect, self._table.commit, self._table.purge, self._verify, self._runtime)
        opened = thread.start()
        self._thread = thread
        try:
            await asyncio.wrap_future(opened)
        except BaseException:
            thread.stop()  # not awaited: after a refusal it has ended, and a cancelled call must not wait
            raise
        if self._locks:
            await self._backups.open()

    async def close(self) -> None:
        """Finish queued calls, checkpoint the write-ahead log, and close the file."""
        await self._backups.close()
        if self._thread is not None:
            await asyncio.wrap_future(self._thread.stop())

    async def ping(self) -> None:
        """Return if the database responds and its files are still those that were opened."""
        self.files.force_check()
        await self._do("", lambda c: c.execute("SELECT layers FROM meta").fetchone())

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        """See `Store.load`."""
        return await self._do(name, lambda c: self._table.load(c, name, unless))

    async def create(self, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """See `Store.create`."""
        return await self._do(name, lambda c: self._table.create(c, name, data, limit), writes=True)

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt], keep: int = 0
    ) -> Committed | Conflict | Missing | Duplicates:
        """See `Store.commit`."""
        return await self._do(name, Commit(name, expected, record, receipts, keep), writes=True)

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> tuple[Receipt, ...] | Missing:
        """See `Store.find_receipts`."""
        return await self._do(name, lambda c: self._table.find_receipts(c, name, incarnation, keys))

    async def delete(
        self, name: str, expected: Stamp, *, with_pins: bool = False
    ) -> Committed | Conflict | Missing | Pinned:
        """See `Store.delete`."""
        return await self._do(name, lambda c: self._table.delete(c, name, expected, with_pins), writes=True)

    async def kept(self, name: str) -> tuple[Stamp, ...] | Missing:
        """See `Store.kept`."""
        return await self._do(name, lambda c: history.kept(c, name))

    async def load_kept(
        self, name: str, at: int | str, unless: Stamp | None = None
    ) -> Record | Unchanged | NotKept | Missing:
        """See `Store.load_kept`."""
        return await self._do(name, lambda c: history.load_kept(c, name, at, unless))

    async def pin(
        self, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int
    ) -> Committed | Pinned | Full | NotKept | Missing:
        """See `Store.pin`."""
        return await self._do(name, lambda c: history.pin(c, name, stamp, tag, data, limit), writes=True)

    async def pins(self, name: str) -> tuple[Pin, ...] | Missing:
        """See `Store.pins`."""
        return await self._do(name, lambda c: history.pins(c, name))

    async def unpin(self, name: str, incarnation: int, tag: str, keep: int) -> Committed | NotKept | Missing:
        """See `Store.unpin`."""
        return await self._do(name, lambda c: history.unpin(c, name, incarnation, tag, keep), writes=True)

    async def import_history(
        self, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]
    ) -> Committed | Missing:
        """See `Store.import_history`."""
        return await self._do(name, lambda c: history.import_history(c, name, incarnation, kept, pins), writes=True)

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        """See `Store.join`. If the member has joined already, this only reads."""
        found = await self._do(name, lambda c: self._table.find_group(c, name, incarnation, group, shard.member))
        if found is not None:
            return found
        return await self._do(name, lambda c: self._table.join(c, name, incarnation, group, size, shard), writes=True)

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        """See `Store.leave`."""
        await self._do(name, lambda c: self._table.leave(c, incarnation, group, member), writes=True)

    async def attachment(self, name: str, incarnation: int, key: str) -> Attachment | Missing | None:
        """See `Store.attachment`."""
        return await self._do(name, lambda c: attachments.attachment(c, name, incarnation, key))

    async def attach(
        self, name: str, incarnation: int, key: str, new: Attachment, expected: int | None
    ) -> Committed | Conflict | Missing:
        """See `Store.attach`."""
        return await self._do(name, lambda c: attachments.attach(c, name, incarnation, key, new, expected), writes=True)

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        """See `Store.list`."""
        return await self._do(None, lambda c: self._table.list(c, prefix, after, limit))

    async def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        """See `Store.receipts`."""
        after = 0
        while True:
            page, after = await self._do(None, lambda c, after=after: self._table.receipts(c, after, _PAGE))  # type: ignore[misc]
            if not page:
                return
            yield page

    async def import_receipts(
        self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
    ) -> Committed | Missing:
        """See `Store.import_receipts`."""
        return await self._do(name, lambda c: self._table.import_receipts(c, name, incarnation, receipts), writes=True)

    async def copy(self, partial: Path, progress: CopyProgress) -> None:
        """Write a consistent, durable copy to a new file, while other calls go on. See `copy_database`.

        `progress` is called in another thread. Raises `StoreError`.
        """
        await self._do(None, Copy(partial, self.path.stat().st_mode, progress))

    def _connect(self) -> sqlite3.Connection:
        return open_file(
            self.files, exclusive=self._locks, busy_seconds=self._busy_seconds, check_bytes=self._check_bytes
        )

    def _verify(self, connection: sqlite3.Connection) -> None:
        was_lost = self.files.lost
        try:
            self.files.verify()
        except StoreLostError:
            self.exclusive = False
            if self._locks and not was_lost:
                # Checkpoint while both files are still open: then nothing is lost if only the log was deleted or the
                # file was moved, and no log remains next to a file that it does not belong to.
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            raise

    async def _do(
        self, name: str | None, work: Callable[[sqlite3.Connection], T] | Commit | Copy, *, writes: bool = False
    ) -> T:
        if self._thread is None:
            raise StoreError("the SQLite store is not open")
        return await self._thread.submit(Job(name, writes, work))


def from_url(url: str, options: StoreOptions) -> SqliteStore:
    """Create the store of a URL `sqlite:///...`. Raises `StoreRefusedError`."""
    options.without_replicas()
    return SqliteStore(path_of(url), options.receipt_seconds, options.exclusive, check_bytes=options.check_bytes)

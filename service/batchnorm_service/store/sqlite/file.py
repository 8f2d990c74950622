"""Opens the SQLite file: creates a new one, upgrades an old one, refuses files of other applications."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Final

from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.base import StoreError, StoreRefusedError
from batchnorm_service.store.sqlite.copies import APPLICATION_ID, check, damaged, flush
from batchnorm_service.store.sqlite.identity import SqliteFiles
from batchnorm_service.store.sqlite.table import SCHEMA
from batchnorm_service.store.sqlite.upgrades import STEPS, upgrade

SCHEMA_VERSION: Final = 4

_PERMISSION: Final = "the service needs permission to read and write the file and its directory"

_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",  # in WAL mode: the log is flushed at every COMMIT
    "PRAGMA fullfsync = ON",  # macOS: a plain fsync stays in the drive's cache; elsewhere it means nothing
    "PRAGMA checkpoint_fullfsync = ON",
    "PRAGMA secure_delete = OFF",  # some builds overwrite freed pages with zeros, which doubles what is written
    "PRAGMA cache_size = -32768",  # 32 MiB: the keys of receipts are random
    "PRAGMA journal_size_limit = 67108864",  # a log that one large transaction blew up shrinks again
)


def open_file(files: SqliteFiles, *, exclusive: bool, busy_seconds: float, check_bytes: int = 0) -> sqlite3.Connection:
    """Open the service's database; create it if missing, upgrade it if an older release wrote it.

    Does not read the file directly: closing a descriptor would drop the POSIX locks that SQLite has on it. Does not
    scan tables either: except for an upgrade, and for the check of a file of up to `check_bytes`, opening takes as long
    for a million layers as for one. A file that was opened before (`files.expected`) is not checked again.

    Raises:
        StoreDamagedError: it is damaged.
        StoreRefusedError: it cannot be opened; the message says why.
    """
    path = files.path
    try:
        if path.exists() and not path.is_file():
            raise StoreRefusedError(f"{path} is {'a directory' if path.is_dir() else 'not a regular file'}")
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Checked first, because SQLite may open such a file and fail later, or report "disk I/O error".
        if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
            raise StoreRefusedError(f"{path} cannot be written; {_PERMISSION}")
    except OSError as error:
        raise StoreRefusedError(f"{path} cannot be opened: {error}") from error
    try:
        files.before_open()
        connection = _connect(files, exclusive=exclusive, busy_seconds=busy_seconds, check_bytes=check_bytes)
        try:
            for directory in {path.parent, *(each.parent for each in made)}:
                flush(directory)  # make the names of the new file and directories durable
            files.after_open()
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError, StoreError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT:
            raise damaged(path, str(error)) from error
        raise StoreRefusedError(_describe_error(path, error)) from error
    return connection


def _connect(files: SqliteFiles, *, exclusive: bool, busy_seconds: float, check_bytes: int) -> sqlite3.Connection:
    """A configured connection to a file with the current schema."""
    path = files.path
    mode = "rwc" if files.expected is None else "rw"  # do not create a file if a certain one is expected
    connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=busy_seconds, isolation_level=None)
    try:
        version = _prepare(connection, path, exclusive=exclusive, busy_seconds=busy_seconds)
        if files.expected is None and path.stat().st_size <= check_bytes:
            check(connection, path)
        if exclusive and version < SCHEMA_VERSION:
            upgrade(connection, path, version, SCHEMA_VERSION)
    except BaseException:
        connection.close()
        raise
    if version == SCHEMA_VERSION or exclusive:
        return connection
    connection.close()  # an upgrade needs exclusive access
    _connect(files, exclusive=True, busy_seconds=busy_seconds, check_bytes=0).close()
    return _connect(files, exclusive=False, busy_seconds=busy_seconds, check_bytes=0)


def _prepare(connection: sqlite3.Connection, path: Path, *, exclusive: bool, busy_seconds: float) -> int:
    """Create the tables of a new file, and configure the connection. Returns the file's schema version."""
    if exclusive:  # set before the first read, SQLite takes and keeps the lock then, and needs no shared memory
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    connection.execute("BEGIN IMMEDIATE")  # one process creates the tables; also proves that the file is writable
    # If two processes start at once, the one whose BEGIN failed will close the file soon: wait for that.
    connection.execute(f"PRAGMA busy_timeout = {round(1000 * max(busy_seconds, 1))}").fetchall()
    version = _version(connection, path)
    if version is None:
        version = SCHEMA_VERSION
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    mode = _write_ahead(connection, RUNTIME.now() + busy_seconds)
    if mode != "wal":
        raise StoreRefusedError(f"{path} has no write-ahead log on this file system (its journal mode is {mode})")
    for pragma in _PRAGMAS:
        connection.execute(pragma).fetchall()
    connection.execute("SELECT layers FROM meta").fetchone()  # a read makes SQLite open the log and the shared memory
    return version


def _write_ahead(connection: sqlite3.Connection, deadline: float) -> object:
    """Turn on the write-ahead log, a persistent property of the file. Retried while others open a new file.

    SQLite's busy timeout does not apply to this pragma.
    """
    while True:
        try:
            return _value(connection, "PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or RUNTIME.now() >= deadline:
                raise
            RUNTIME.pause_thread(0.01)


def _version(connection: sqlite3.Connection, path: Path) -> int | None:
    """The file's schema version; None if it is empty. Refuses other applications' files, and unknown versions."""
    application = _value(connection, "PRAGMA application_id")
    version = _value(connection, "PRAGMA user_version")
    tables = _value(connection, "SELECT count(*) FROM sqlite_master")
    if application == version == tables == 0:
        return None
    if application != APPLICATION_ID:
        raise StoreRefusedError(f"{path} is a database of another application; give the service a file of its own")
    assert isinstance(version, int)  # noqa: S101 - a field of the file's header
    if version != SCHEMA_VERSION and version not in STEPS:
        raise StoreRefusedError(
            f"{path} has schema version {version}, and this release knows {SCHEMA_VERSION}: start the release that"
            " wrote the file, or a later one, or give this one another file with --store or BATCHNORM_STORE"
        )
    return version


def _value(connection: sqlite3.Connection, statement: str) -> object:
    row: tuple[object] = connection.execute(statement).fetchone()
    return row[0]


def _describe_error(path: Path, error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary result code
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return f"{path} is in use by another process; each service needs a file of its own, or stop the other one"
    if code == sqlite3.SQLITE_NOTADB:
        return f"{path} is not an SQLite database; give the service a file of its own"
    if code == sqlite3.SQLITE_READONLY:
        return f"{path} cannot be written; {_PERMISSION}"
    return f"{path} cannot be opened: {error}"

"""The SQLite file: whether it is one of ours, making a new one, upgrading an old one, refusing others in words."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Final

from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.base import StoreError, StoreRefusedError
from batchnorm_service.store.sqlite.identity import SqliteFiles
from batchnorm_service.store.sqlite.table import SCHEMA
from batchnorm_service.store.sqlite.upgrades import STEPS, flush, upgrade

APPLICATION_ID: Final = 0x424E5356  # "BNSV"; `file` and others read it from the header
SCHEMA_VERSION: Final = 2

_PERMISSION: Final = "the service needs permission to read and write the file and its directory"

_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",  # in WAL mode: the log is flushed at every COMMIT
    "PRAGMA fullfsync = ON",  # macOS: a plain fsync stays in the drive's cache; elsewhere it means nothing
    "PRAGMA checkpoint_fullfsync = ON",
    "PRAGMA secure_delete = OFF",  # some builds overwrite freed pages with zeros, which doubles what is written
    "PRAGMA cache_size = -32768",  # 32 MiB: the keys of receipts are random
    "PRAGMA journal_size_limit = 67108864",  # a log that one large transaction blew up shrinks again
)


def open_file(files: SqliteFiles, *, exclusive: bool, busy_seconds: float) -> sqlite3.Connection:
    """Open the service's database, which is made if there is none, and upgraded if an older release made it.

    Nothing here reads a file that SQLite may have open: closing it would drop the locks that this process has on it.
    And nothing scans a table: opening takes as long for a million layers as for one, but for an upgrade.

    Raises:
        StoreRefusedError: with the reason in words.
    """
    path = files.path
    try:
        if path.exists() and not path.is_file():
            raise StoreRefusedError(f"{path} is {'a directory' if path.is_dir() else 'not a regular file'}")
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asked first, because SQLite may open such a file all the same and fail later, or say "disk I/O error".
        if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
            raise StoreRefusedError(f"{path} cannot be written; {_PERMISSION}")
    except OSError as error:
        raise StoreRefusedError(f"{path} cannot be opened: {error}") from error
    try:
        files.opening()
        connection = _connect(files, exclusive=exclusive, busy_seconds=busy_seconds)
        try:
            for directory in {path.parent, *(each.parent for each in made)}:
                flush(directory)  # the names of the file and of the directories that were made for it
            files.opened()
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError, StoreError) as error:
        raise StoreRefusedError(_in_words(path, error)) from error
    return connection


def _connect(files: SqliteFiles, *, exclusive: bool, busy_seconds: float) -> sqlite3.Connection:
    """A connection that is ready for use, to a file of this release's schema."""
    path = files.path
    mode = "rwc" if files.expected is None else "rw"  # of those that are expected, none is to be made
    connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=busy_seconds, isolation_level=None)
    try:
        version = _prepare(connection, path, exclusive=exclusive, busy_seconds=busy_seconds)
        if exclusive and version < SCHEMA_VERSION:
            upgrade(connection, path, version, SCHEMA_VERSION)
    except BaseException:
        connection.close()
        raise
    if version == SCHEMA_VERSION or exclusive:
        return connection
    connection.close()  # an upgrade needs the file for itself
    _connect(files, exclusive=True, busy_seconds=busy_seconds).close()
    return _connect(files, exclusive=False, busy_seconds=busy_seconds)


def _prepare(connection: sqlite3.Connection, path: Path, *, exclusive: bool, busy_seconds: float) -> int:
    """Make the tables if there are none, and set what every connection needs. Returns the file's schema version."""
    if exclusive:  # before the first read: then SQLite takes the lock with it, keeps it, and needs no shared memory
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    connection.execute("BEGIN IMMEDIATE")  # one process makes the tables; also proves that the file can be written
    # Where two start at once, the one whose BEGIN failed is about to close the file: the other waits for that.
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
    connection.execute("SELECT layers FROM meta").fetchone()  # a read opens the log and the shared memory
    return version


def _write_ahead(connection: sqlite3.Connection, deadline: float) -> object:
    """Turn on the write-ahead log, which stays on in the file. While others open a new file it has to be tried again.

    SQLite's own waiting for a lock does not cover this change.
    """
    while True:
        try:
            return _value(connection, "PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or RUNTIME.now() >= deadline:
                raise
            RUNTIME.pause_thread(0.01)


def _version(connection: sqlite3.Connection, path: Path) -> int | None:
    """The file's schema version, None if it is empty; refuses one that is neither empty nor ours, or too new."""
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


def _in_words(path: Path, error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extension, which says more than users need
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return f"{path} is in use by another process; each service needs a file of its own, or stop the other one"
    if code == sqlite3.SQLITE_NOTADB:
        return f"{path} is not an SQLite database; give the service a file of its own"
    if code == sqlite3.SQLITE_READONLY:
        return f"{path} cannot be written; {_PERMISSION}"
    return f"{path} cannot be opened: {error}"

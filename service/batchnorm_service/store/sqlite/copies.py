"""Copies of SQLite files: written under a temporary name, flushed, and checked for damage."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from batchnorm_service.store.base import StoreDamagedError, StoreRefusedError

APPLICATION_ID: Final = 0x424E5356  # "BNSV"; `file` and others read it from the header

_PAGES: Final = 256  # copied at once: 1 MiB of the usual 4 KiB

CopyProgress = Callable[[int, int], None]
"""Called after each step with the number of copied pages, and of all; may raise to stop."""


def copy_database(connection: sqlite3.Connection, partial: Path, mode: int, progress: CopyProgress) -> None:
    """Write a consistent, durable copy of an open database to a new file; nothing is left if that fails.

    The connection may be used inside `progress`; what it writes is in the copy.

    Args:
        connection: the database; not in a transaction, or in one that reads.
        partial: the new file.
        mode: its permissions; SQLite would create it with the process's default permissions.
        progress: called between steps.

    Raises:
        sqlite3.Error, OSError: it cannot be read or written, or exists.
    """
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o777))
    try:
        with closing(sqlite3.connect(partial)) as target:
            connection.backup(target, pages=_PAGES, progress=lambda _, left, total: progress(total - left, total))
        flush(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def copy_file(path: Path, partial: Path, progress: CopyProgress) -> None:
    """The same of a file that this process has not open; other processes may use it, if they share it.

    Raises:
        sqlite3.Error, OSError: as above; `SQLITE_BUSY` if another process has it locked.
    """
    # Read-only connections leave a log behind, and need one: a medium that cannot be written must be immutable.
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    mode = "mode=rw" if writable else _read_only(path)
    source = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=1, isolation_level=None)
    with closing(source):
        # One transaction: otherwise each commit of another process would start the copy again.
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()
        copy_database(source, partial, path.stat().st_mode, progress)


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Check all pages of a database. Raises `StoreDamagedError`, or another `sqlite3.Error` if it cannot be read."""
    try:
        rows = connection.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        rows = [(str(error),)]
    if rows != [("ok",)]:
        raise damaged(path, " ".join(str(rows[0][0]).split()))


def check_backup(path: Path) -> int:
    """Check a file that is to be restored. Returns its schema version.

    Raises:
        StoreDamagedError: it is damaged.
        StoreRefusedError: it is no file of this service, or cannot be read.
    """
    if not path.is_file():
        raise StoreRefusedError(f"there is no file {path}")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{_read_only(path)}", uri=True)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            if application != APPLICATION_ID:
                raise StoreRefusedError(f"{path} is not a file of this service")
            check(connection, path)
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        if is_damage(error):
            raise damaged(path, str(error)) from error
        raise StoreRefusedError(f"{path} cannot be read: {error}") from error
    return version


def _read_only(path: Path) -> str:
    return "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"


def is_backup(path: Path) -> bool:
    """Whether the header of a file, which this process has not open, is that of a file of this service."""
    with path.open("rb") as file:
        header = file.read(72)
    return header.startswith(b"SQLite format 3\0") and header[68:] == APPLICATION_ID.to_bytes(4, "big")


def is_damage(error: Exception) -> bool:
    """Whether an error says that the file is damaged."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def damaged(path: Path, reason: str) -> StoreDamagedError:
    """The error for a damaged file."""
    return StoreDamagedError(f"{path} is damaged: {reason}")


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk (fsync)."""
    if os.name == "nt" and path.is_dir():  # Windows cannot flush a directory
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

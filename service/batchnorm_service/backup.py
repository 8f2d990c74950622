"""Backup of a store to an SQLite file, while services run, and restoring it.

A backup is written next to its final name, flushed, checked, and renamed: a file of that name is always whole.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from batchnorm_service.store.base import Store, StoreDamagedError, StoreError, StoreRefusedError
from batchnorm_service.store.sqlite.backup_socket import request_backup
from batchnorm_service.store.sqlite.copies import check_backup, copy_file, flush, is_backup, is_damage
from batchnorm_service.store.sqlite.file import SCHEMA_VERSION
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.transfer import ProgressCallback, Report, migrate


def backup(store: Store, file: Path, progress: ProgressCallback) -> Report | None:
    """Write all layers, their history and receipts to a file. An earlier backup of that name is replaced.

    An SQLite store is copied as of one moment: by the process that has it locked, or by this one if it is not locked.
    From Valkey, each layer is copied as of one moment.

    Args:
        store: from `store_to_move`.
        file: the backup.
        progress: called with the progress.

    Returns:
        What was copied from Valkey; `changed` are layers that changed during the backup. None for an SQLite store.

    Raises:
        StoreRefusedError: the store cannot be used, or the file is something else than a backup.
        StoreDamagedError: the store is damaged, and so would be the backup.
        StoreError: it failed; a file of that name is as it was before.
    """
    if file.exists():
        if isinstance(store, SqliteStore) and file.samefile(store.path):
            raise StoreRefusedError(f"{file} is the store itself")
        if not is_backup(file):
            raise StoreRefusedError(f"{file} exists, and is not a backup")
    report = None
    with _replacing(file) as partial:
        if isinstance(store, SqliteStore):
            _back_up_file(store.path, partial, progress)
        else:
            report = asyncio.run(migrate(store, SqliteStore(partial), progress, online=True))
    return report


def restore(store: Store, file: Path, progress: ProgressCallback, *, overwrite: bool) -> Report | None:
    """Restore a backup, which is checked first.

    An SQLite store is replaced as a whole. Into Valkey, the layers are copied, as `migrate` does.

    Args:
        store: from `store_to_move`; no service may use it.
        file: the backup; unchanged.
        progress: called with the progress.
        overwrite: replace an existing SQLite file, or layers in Valkey that differ.

    Returns:
        What was copied to Valkey. None for an SQLite store.

    Raises:
        StoreDamagedError: the backup is damaged.
        StoreRefusedError: the backup or the store cannot be used, or the store exists.
        StoreError: it failed; an SQLite store is as it was before.
    """
    if (version := check_backup(file)) > SCHEMA_VERSION:
        raise StoreRefusedError(f"{file} has schema version {version}, and this release knows {SCHEMA_VERSION}")
    if not isinstance(store, SqliteStore):
        return asyncio.run(_restore_layers(file, store, progress, overwrite=overwrite))
    if store.path.exists():
        if file.samefile(store.path):
            raise StoreRefusedError(f"{file} is the store itself")
        if not overwrite:
            raise StoreRefusedError(f"{store.path} exists; --overwrite replaces it")
    store.path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(store.path) as partial:
        _copy(file, partial, progress)
        _close_old(store.path)
    return None


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A name for a new file, which is then checked and renamed to `file`; removed if anything fails."""
    partial = file.absolute().with_name(f"{file.name}.partial")
    try:
        with _alone(file):
            try:
                _remove(partial)  # of an earlier call that was killed
                yield partial
                check_backup(partial)
                flush(partial)
                partial.replace(file)
                flush(file.absolute().parent)
            finally:
                with suppress(OSError):
                    _remove(partial)
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error}") from error


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Lock a file that will be written, by a lock file, which only a call that is killed leaves behind.

    Raises:
        StoreRefusedError: another process writes it.
    """
    path = file.absolute().with_name(f"{file.name}.lock")
    while True:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreRefusedError(f"{file} is being written by another process; try again later") from None
            if _is_at(path, lock.fileno()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        # Another call, which has just ended, has removed the file that this one has locked.


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(partial: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{partial}{suffix}").unlink(missing_ok=True)


def _back_up_file(path: Path, partial: Path, progress: ProgressCallback) -> None:
    if not request_backup(path, partial, lambda done, total: progress("pages", done, total)):
        _copy(path, partial, progress)


def _copy(path: Path, partial: Path, progress: ProgressCallback) -> None:
    try:
        copy_file(path, partial, lambda done, total: progress("pages", done, total))
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise StoreRefusedError(
                f"{path} is locked by a process that offers no backups; stop it, or upgrade it"
            ) from error
        if is_damage(error):
            raise StoreDamagedError(f"{path} is damaged: {error}") from error
        raise StoreError(f"{path} cannot be copied: {error}") from error


async def _restore_layers(file: Path, store: Store, progress: ProgressCallback, *, overwrite: bool) -> Report:
    """Copy the layers from a copy of the backup: opening the file itself would upgrade it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "backup.db"
        shutil.copyfile(file, copy)
        return await migrate(SqliteStore(copy), store, progress, overwrite=overwrite)


def _close_old(path: Path) -> None:
    """Make sure that no process uses a store that will be replaced, and remove its log, which belongs to the old file.

    Raises:
        StoreRefusedError: it is in use.
    """
    if not path.exists():
        return
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1, isolation_level=None)
    with closing(connection):
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if not is_damage(error):
                raise StoreRefusedError(f"{path} is in use by another process; stop the service first") from error
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    if os.name != "nt":
        flush(path.parent)

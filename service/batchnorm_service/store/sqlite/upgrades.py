"""Upgrades of SQLite files of older releases: first a backup copy next to the file, then one transaction.

A step upgrades one schema version to the next. Its statements must not be changed when the schema changes again.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from batchnorm_service.store.base import StoreRefusedError
from batchnorm_service.store.sqlite.copies import copy_database, flush

_log = logging.getLogger(__name__)

_LAYERS: Final = ("id", "name", "incarnation", "version", "commit_id", "data")
_META: Final = ("id", "layers", "floor")
_SHARDS: Final = ("incarnation", "grp", "member", "size", "fingerprint", "part", "expires")
_RECEIPTS_1: Final = (  # of schema 1, a version number that releases with different layouts shared
    ("incarnation", "key", "fingerprint", "version", "batch", "expires"),
    ("incarnation", "key", "fingerprint", "version", "batch", "payload", "expires"),
)
_RECEIPTS_2: Final = ("id", "incarnation", "key", "fingerprint", "version", "batch", "payload", "expires")


class Step(NamedTuple):
    """Upgrade from one schema version to the next.

    Attributes:
        known: whether the file's tables are those of a release.
        apply: runs the upgrade's statements.
    """

    known: Callable[[sqlite3.Connection], bool]
    apply: Callable[[sqlite3.Connection], None]


def _known_1(connection: sqlite3.Connection) -> bool:
    return (
        _columns(connection, "layers") == _LAYERS
        and _columns(connection, "meta") == _META
        and _columns(connection, "receipts") in _RECEIPTS_1
        and _columns(connection, "shards") in {(), _SHARDS}
    )


def _from_1(connection: sqlite3.Connection) -> None:
    """Sort receipts by expiry, with an index by key; add payloads and the table of shards if missing."""
    payload = "payload" if "payload" in _columns(connection, "receipts") else "x''"
    connection.execute("ALTER TABLE receipts RENAME TO receipts_of_schema_1")
    connection.execute("""
    CREATE TABLE receipts (
        id INTEGER PRIMARY KEY,
        incarnation INTEGER NOT NULL,
        key BLOB NOT NULL,
        fingerprint BLOB NOT NULL,
        version INTEGER NOT NULL,
        batch INTEGER NOT NULL,
        payload BLOB NOT NULL,
        expires INTEGER NOT NULL,
        UNIQUE (key, incarnation)
    )
    """)
    connection.execute(
        "INSERT INTO receipts (incarnation, key, fingerprint, version, batch, payload, expires)"  # noqa: S608
        f" SELECT incarnation, key, fingerprint, version, batch, {payload}, expires"
        " FROM receipts_of_schema_1 ORDER BY expires"
    )
    connection.execute("DROP TABLE receipts_of_schema_1")  # and its index with it
    if not _columns(connection, "shards"):
        connection.execute("""
    CREATE TABLE shards (
        incarnation INTEGER NOT NULL,
        grp BLOB NOT NULL,
        member BLOB NOT NULL,
        size INTEGER NOT NULL,
        fingerprint BLOB NOT NULL,
        part BLOB NOT NULL,
        expires INTEGER NOT NULL,
        PRIMARY KEY (incarnation, grp, member)
    )
    """)
        connection.execute("CREATE INDEX shards_by_expiry ON shards (expires)")
    connection.execute("CREATE INDEX receipts_by_expiry ON receipts (expires)")


def _known_2(connection: sqlite3.Connection) -> bool:
    return (
        _columns(connection, "layers") == _LAYERS
        and _columns(connection, "meta") == _META
        and _columns(connection, "receipts") == _RECEIPTS_2
        and _columns(connection, "shards") == _SHARDS
        and _columns(connection, "kept") == _columns(connection, "pins") == ()
    )


def _from_2(connection: sqlite3.Connection) -> None:
    """Add the tables of kept records and pins."""
    connection.execute("""
    CREATE TABLE kept (
        incarnation INTEGER NOT NULL,
        version INTEGER NOT NULL,
        commit_id INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (incarnation, version)
    )
    """)
    connection.execute("""
    CREATE TABLE pins (
        incarnation INTEGER NOT NULL,
        tag TEXT NOT NULL COLLATE BINARY,
        version INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (incarnation, tag)
    )
    """)


def _known_3(connection: sqlite3.Connection) -> bool:
    return (
        _columns(connection, "layers") == _LAYERS
        and _columns(connection, "meta") == _META
        and _columns(connection, "receipts") == _RECEIPTS_2
        and _columns(connection, "shards") == _SHARDS
        and _columns(connection, "kept") == ("incarnation", "version", "commit_id", "data")
        and _columns(connection, "pins") == ("incarnation", "tag", "version", "data")
        and _columns(connection, "attachments") == ()
    )


def _from_3(connection: sqlite3.Connection) -> None:
    """Add the table of attachments."""
    connection.execute("""
    CREATE TABLE attachments (
        incarnation INTEGER NOT NULL,
        key TEXT NOT NULL COLLATE BINARY,
        commit_id INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (incarnation, key)
    )
    """)


STEPS: Final[Mapping[int, Step]] = {
    1: Step(_known_1, _from_1),
    2: Step(_known_2, _from_2),
    3: Step(_known_3, _from_3),
}
"""The step from each schema version to the next."""


def upgrade(connection: sqlite3.Connection, path: Path, version: int, target: int) -> None:
    """Upgrade the file to schema version `target`, in one transaction.

    Args:
        connection: has the file locked exclusively, and is not in a transaction.
        path: of the file; the backup is created next to it.
        version: the file's schema version.
        target: its new schema version.

    Raises:
        StoreRefusedError: it cannot be upgraded; the message says why. The file is unchanged.
    """
    try:
        if not STEPS[version].known(connection):
            raise StoreRefusedError("no release made a file with these tables")
        copy = _copy(connection, path, version)
        _log.warning("%s: upgrading schema %d to %d; a copy of the file as it was is %s", path, version, target, copy)
        connection.execute("BEGIN IMMEDIATE")
        for each in range(version, target):
            STEPS[each].apply(connection)
        connection.execute(f"PRAGMA user_version = {target}")
        connection.execute("COMMIT")
    except (sqlite3.Error, OSError, StoreRefusedError) as error:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise StoreRefusedError(f"{path} cannot be upgraded from schema version {version}: {error}") from error


def _copy(connection: sqlite3.Connection, path: Path, version: int) -> Path:
    """Make a durable backup of the file under a free name."""
    partial = path.with_name(f"{path.name}.schema-{version}.partial")
    partial.unlink(missing_ok=True)  # left by an interrupted upgrade
    copy_database(connection, partial, path.stat().st_mode, lambda *_: None)
    try:
        copy = _free_name(path.with_name(f"{path.name}.schema-{version}.backup"))
        partial.rename(copy)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)
    return copy


def _free_name(path: Path) -> Path:
    """This path, or the first free one with a suffix `-2`, `-3`, ..."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _columns(connection: sqlite3.Connection, table: str) -> tuple[str, ...]:
    return tuple(name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})"))

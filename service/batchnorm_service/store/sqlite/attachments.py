"""Attachments of records as SQL statements, to be run inside a transaction."""

from __future__ import annotations

import sqlite3
from typing import Final

from batchnorm_service.store.base import Attachment, Committed, Conflict, Missing
from batchnorm_service.store.sqlite.statements import load_stamp

SCHEMA: Final = (
    # As in `layers`, the commit id precedes the data.
    """
    CREATE TABLE attachments (
        incarnation INTEGER NOT NULL,
        key TEXT NOT NULL COLLATE BINARY,
        commit_id INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (incarnation, key)
    )
    """,
)


def attachment(connection: sqlite3.Connection, name: str, incarnation: int, key: str) -> Attachment | Missing | None:
    """See `Store.attachment`."""
    if not _exists(connection, name, incarnation):
        return Missing()
    row = connection.execute(
        "SELECT commit_id, data FROM attachments WHERE incarnation = ? AND key = ?", (incarnation, key)
    ).fetchone()
    return None if row is None else Attachment(*row)


def attach(
    connection: sqlite3.Connection, name: str, incarnation: int, key: str, new: Attachment, expected: int | None
) -> Committed | Conflict | Missing:
    """See `Store.attach`."""
    if not _exists(connection, name, incarnation):
        return Missing()
    row = connection.execute(
        "SELECT commit_id FROM attachments WHERE incarnation = ? AND key = ?", (incarnation, key)
    ).fetchone()
    if (None if row is None else row[0]) not in (expected, new.commit_id):
        return Conflict()
    connection.execute(
        "INSERT OR REPLACE INTO attachments (incarnation, key, commit_id, data) VALUES (?, ?, ?, ?)",
        (incarnation, key, *new),
    )
    return Committed()


def delete_attachments(connection: sqlite3.Connection, incarnation: int) -> None:
    """Remove the attachments of a record that is deleted."""
    connection.execute("DELETE FROM attachments WHERE incarnation = ?", (incarnation,))


def _exists(connection: sqlite3.Connection, name: str, incarnation: int) -> bool:
    present = load_stamp(connection, name)
    return present is not None and present.incarnation == incarnation

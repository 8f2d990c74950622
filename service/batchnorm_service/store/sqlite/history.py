"""Kept records and pins as SQL statements, to be run inside a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from batchnorm_service.store.base import Committed, Full, Missing, NotKept, Pin, Pinned, Record, Stamp, Unchanged
from batchnorm_service.store.sqlite.statements import load_record, load_stamp

SCHEMA: Final = (
    # As in `layers`, the stamp's columns precede the data. WITHOUT ROWID would store the data in the index, and a
    # search for versions would then read it.
    """
    CREATE TABLE kept (
        incarnation INTEGER NOT NULL,
        version INTEGER NOT NULL,
        commit_id INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (incarnation, version)
    )
    """,
    """
    CREATE TABLE pins (
        incarnation INTEGER NOT NULL,
        tag TEXT NOT NULL COLLATE BINARY,
        version INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (incarnation, tag)
    )
    """,
)


def keep_newest(connection: sqlite3.Connection, name: str) -> None:
    """Copy the newest record to the kept ones."""
    connection.execute(
        "INSERT OR REPLACE INTO kept (incarnation, version, commit_id, data)"
        " SELECT incarnation, version, commit_id, data FROM layers WHERE name = ?",
        (name,),
    )


def trim(connection: sqlite3.Connection, incarnation: int, keep: int) -> None:
    """Remove kept records without a pin, except the `keep` newest."""
    connection.execute(
        "DELETE FROM kept WHERE incarnation = ?1 AND version IN (SELECT version FROM kept WHERE incarnation = ?1"
        " AND version NOT IN (SELECT version FROM pins WHERE incarnation = ?1)"
        " ORDER BY version DESC LIMIT -1 OFFSET ?2)",
        (incarnation, keep),
    )


def has_pins(connection: sqlite3.Connection, incarnation: int) -> bool:
    """Whether a record has pins."""
    return connection.execute("SELECT 1 FROM pins WHERE incarnation = ? LIMIT 1", (incarnation,)).fetchone() is not None


def delete_history(connection: sqlite3.Connection, incarnation: int) -> None:
    """Remove the kept records and pins of a record that is deleted."""
    connection.execute("DELETE FROM kept WHERE incarnation = ?", (incarnation,))
    connection.execute("DELETE FROM pins WHERE incarnation = ?", (incarnation,))


def kept(connection: sqlite3.Connection, name: str) -> tuple[Stamp, ...] | Missing:
    """See `Store.kept`."""
    if (present := load_stamp(connection, name)) is None:
        return Missing()
    rows = connection.execute(
        "SELECT incarnation, version, commit_id FROM kept WHERE incarnation = ? ORDER BY version DESC",
        (present.incarnation,),
    )
    return tuple(Stamp(*row) for row in rows)


def load_kept(
    connection: sqlite3.Connection, name: str, at: int | str, unless: Stamp | None
) -> Record | Unchanged | NotKept | Missing:
    """See `Store.load_kept`."""
    if (present := load_stamp(connection, name)) is None:
        return Missing()
    incarnation = present.incarnation
    pin = None if isinstance(at, int) else _pin(connection, incarnation, at)
    version = at if isinstance(at, int) else None if pin is None else pin.version
    stamp = None if version is None else _find(connection, present, version)
    if stamp is None:
        return NotKept()
    if stamp == unless:
        return Unchanged()
    if stamp == present:
        return load_record(connection, name) or Missing()
    return _load(connection, stamp)


def pin(
    connection: sqlite3.Connection, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int
) -> Committed | Pinned | Full | NotKept | Missing:
    """See `Store.pin`."""
    present = load_stamp(connection, name)
    stamp = stamp or present
    if present is None or stamp is None or present.incarnation != stamp.incarnation:
        return Missing()
    if (taken := _pin(connection, stamp.incarnation, tag)) is not None:
        return Pinned(taken)
    if _find(connection, present, stamp.version) != stamp:
        return NotKept()
    (count,) = connection.execute("SELECT count(*) FROM pins WHERE incarnation = ?", (stamp.incarnation,)).fetchone()
    if count >= limit:
        return Full()
    if stamp == present:
        keep_newest(connection, name)
    _write_pin(connection, stamp.incarnation, Pin(tag, stamp.version, data))
    return Committed(pinned=_load(connection, stamp))


def pins(connection: sqlite3.Connection, name: str) -> tuple[Pin, ...] | Missing:
    """See `Store.pins`."""
    if (present := load_stamp(connection, name)) is None:
        return Missing()
    rows = connection.execute(
        "SELECT tag, version, data FROM pins WHERE incarnation = ? ORDER BY tag", (present.incarnation,)
    )
    return tuple(Pin(*row) for row in rows)


def unpin(
    connection: sqlite3.Connection, name: str, incarnation: int, tag: str, keep: int
) -> Committed | NotKept | Missing:
    """See `Store.unpin`."""
    present = load_stamp(connection, name)
    if present is None or present.incarnation != incarnation:
        return Missing()
    done = connection.execute("DELETE FROM pins WHERE incarnation = ? AND tag = ?", (incarnation, tag))
    if not done.rowcount:
        return NotKept()
    trim(connection, incarnation, keep)
    return Committed()


def import_history(
    connection: sqlite3.Connection, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]
) -> Committed | Missing:
    """See `Store.import_history`."""
    present = load_stamp(connection, name)
    if present is None or present.incarnation != incarnation:
        return Missing()
    for (_, version, commit_id), data in ((record.stamp, record.data) for record in kept):
        connection.execute(
            "INSERT OR REPLACE INTO kept (incarnation, version, commit_id, data) VALUES (?, ?, ?, ?)",
            (incarnation, version, commit_id, data),
        )
    for each in pins:
        if each.version == present.version:
            keep_newest(connection, name)
        _write_pin(connection, incarnation, each)
    return Committed()


def _find(connection: sqlite3.Connection, present: Stamp, version: int) -> Stamp | None:
    """The stamp of the newest or kept record of a version."""
    if present.version == version:
        return present
    row = connection.execute(
        "SELECT commit_id FROM kept WHERE incarnation = ? AND version = ?", (present.incarnation, version)
    ).fetchone()
    return None if row is None else Stamp(present.incarnation, version, row[0])


def _load(connection: sqlite3.Connection, stamp: Stamp) -> Record:
    """The kept record with this stamp, which must be there."""
    (data,) = connection.execute(
        "SELECT data FROM kept WHERE incarnation = ? AND version = ?", (stamp.incarnation, stamp.version)
    ).fetchone()
    return Record(stamp, data)


def _pin(connection: sqlite3.Connection, incarnation: int, tag: str) -> Pin | None:
    row = connection.execute(
        "SELECT tag, version, data FROM pins WHERE incarnation = ? AND tag = ?", (incarnation, tag)
    ).fetchone()
    return None if row is None else Pin(*row)


def _write_pin(connection: sqlite3.Connection, incarnation: int, pin: Pin) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO pins (incarnation, tag, version, data) VALUES (?, ?, ?, ?)", (incarnation, *pin)
    )

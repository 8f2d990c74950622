"""SQL statements for many rows at once.

Python's sqlite3 releases the GIL around every statement, and under load it may take milliseconds to get it back from
the event loop. So queued calls are combined into few statements. To limit the number of distinct statements that SQLite
prepares, they have 1, 2, 4, ... rows: queries are padded with their last row, inserts are split.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

from batchnorm_service.store.base import Receipt, Record, Stamp

_MAX_ROWS: Final = 128  # of a statement: up to 896 parameters; every SQLite allows 999


def stamps(connection: sqlite3.Connection, names: Sequence[str]) -> dict[str, Stamp]:
    """The stamps of existing layers, by name."""
    found: dict[str, Stamp] = {}
    for part in _padded_chunks(names):
        rows = connection.execute(_select_stamps(len(part)), part)
        found.update((name, Stamp(*stamp)) for name, *stamp in rows)
    return found


def load_stamp(connection: sqlite3.Connection, name: str) -> Stamp | None:
    """The stamp of a layer."""
    return stamps(connection, [name]).get(name)


def load_record(connection: sqlite3.Connection, name: str) -> Record | None:
    """The record of a layer."""
    row = connection.execute(
        "SELECT incarnation, version, commit_id, data FROM layers WHERE name = ?", (name,)
    ).fetchone()
    return None if row is None else Record(Stamp(*row[:3]), row[3])


def unexpired(
    connection: sqlite3.Connection, keys: Sequence[tuple[int, bytes]], now: float
) -> dict[tuple[int, bytes], Receipt]:
    """The unexpired receipts, by incarnation and key."""
    found: dict[tuple[int, bytes], Receipt] = {}
    for part in _padded_chunks(keys):
        rows = connection.execute(_select_receipts(len(part)), (*_flatten(part), now))
        found.update(((incarnation, receipt[0]), Receipt(*receipt)) for incarnation, *receipt in rows)
    return found


def update_records(connection: sqlite3.Connection, records: Sequence[tuple[str, Record]]) -> None:
    """Replace the records of existing layers."""
    for part in _chunks(records):
        rows = [(name, *record.stamp, record.data) for name, record in part]
        connection.execute(_update_records(len(part)), _flatten(rows))


def insert_receipts(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Add receipts: (incarnation, key, fingerprint, version, batch, payload, expires) each."""
    for part in _chunks(rows):
        connection.execute(_insert_receipts(len(part)), _flatten(part))


@cache
def _select_stamps(count: int) -> str:
    return f"SELECT name, incarnation, version, commit_id FROM layers WHERE name IN ({_placeholders(1, count, '?')})"  # noqa: S608


@cache
def _select_receipts(count: int) -> str:
    # CROSS JOIN fixes the join order in SQLite: each key is looked up in the index by key.
    return (
        "SELECT incarnation, key, fingerprint, version, batch, payload"  # noqa: S608
        f" FROM (VALUES {_placeholders(2, count)}) AS wanted CROSS JOIN receipts"
        " WHERE incarnation = wanted.column1 AND key = wanted.column2 AND expires > ?"
    )


@cache
def _update_records(count: int) -> str:
    # An upsert finds each row by its name; for UPDATE ... FROM the planner may choose to scan the table.
    return (
        f"INSERT INTO layers (name, incarnation, version, commit_id, data) VALUES {_placeholders(5, count)}"  # noqa: S608
        " ON CONFLICT (name) DO UPDATE SET incarnation = excluded.incarnation, version = excluded.version,"
        " commit_id = excluded.commit_id, data = excluded.data"
    )


@cache
def _insert_receipts(count: int) -> str:
    return (  # REPLACE: an expired receipt with the same key may not have been purged yet
        "INSERT OR REPLACE INTO receipts (incarnation, key, fingerprint, version, batch, payload, expires)"  # noqa: S608
        f" VALUES {_placeholders(7, count)}"
    )


def _placeholders(columns: int, rows: int, row: str = "") -> str:
    return ", ".join([row or f"({', '.join('?' * columns)})"] * rows)


def _flatten(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [value for row in rows for value in row]


def _padded_chunks(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The rows in few chunks, each padded to 1, 2, 4, ... rows by repeating its last row."""
    for begin in range(0, len(rows), _MAX_ROWS):
        part = [*rows[begin : begin + _MAX_ROWS]]
        yield part + part[-1:] * ((1 << (len(part) - 1).bit_length()) - len(part))


def _chunks(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The rows in chunks of 1, 2, 4, ... rows."""
    begin = 0
    while (left := len(rows) - begin) > 0:
        count = min(_MAX_ROWS, 1 << (left.bit_length() - 1))
        yield rows[begin : begin + count]
        begin += count

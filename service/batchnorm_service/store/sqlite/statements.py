"""Statements about many rows at once.

Python's SQLite module lets go of Python's lock around every statement, and under load each of those is a chance for the
event loop to run for milliseconds before the next one may. So what waits together is asked and written together. To
keep the statements few that SQLite has to prepare, they come for 1, 2, 4, ... rows only: a question is filled up with
its last row, what is written comes in parts.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

from batchnorm_service.store.base import Receipt, Record, Stamp

_MOST: Final = 128  # rows of one statement: 896 parameters at most, where any SQLite takes 999


def stamps(connection: sqlite3.Connection, names: Sequence[str]) -> dict[str, Stamp]:
    """The stamps of those layers that there are, by name."""
    found: dict[str, Stamp] = {}
    for part in _filled_up(names):
        rows = connection.execute(_select_stamps(len(part)), part)
        found.update((name, Stamp(*stamp)) for name, *stamp in rows)
    return found


def unexpired(
    connection: sqlite3.Connection, keys: Sequence[tuple[int, bytes]], now: float
) -> dict[tuple[int, bytes], Receipt]:
    """Those receipts that there are and that still count, by incarnation and key."""
    found: dict[tuple[int, bytes], Receipt] = {}
    for part in _filled_up(keys):
        rows = connection.execute(_select_receipts(len(part)), (*_flat(part), now))
        found.update(((incarnation, receipt[0]), Receipt(*receipt)) for incarnation, *receipt in rows)
    return found


def update_records(connection: sqlite3.Connection, records: Sequence[tuple[str, Record]]) -> None:
    """Replace the records of layers that are there."""
    for part in _parts(records):
        rows = [(name, *record.stamp, record.data) for name, record in part]
        connection.execute(_update_records(len(part)), _flat(rows))


def insert_receipts(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Add receipts: (incarnation, key, fingerprint, version, batch, payload, expires) each."""
    for part in _parts(rows):
        connection.execute(_insert_receipts(len(part)), _flat(part))


@cache
def _select_stamps(count: int) -> str:
    return f"SELECT name, incarnation, version, commit_id FROM layers WHERE name IN ({_marks(1, count, '?')})"  # noqa: S608


@cache
def _select_receipts(count: int) -> str:
    # CROSS JOIN is SQLite's way to say which table is the outer one: each key is looked up in the index by key.
    return (
        "SELECT incarnation, key, fingerprint, version, batch, payload"  # noqa: S608
        f" FROM (VALUES {_marks(2, count)}) AS wanted CROSS JOIN receipts"
        " WHERE incarnation = wanted.column1 AND key = wanted.column2 AND expires > ?"
    )


@cache
def _update_records(count: int) -> str:
    # An upsert finds each row by its name; UPDATE ... FROM leaves it to the planner which table it scans.
    return (
        f"INSERT INTO layers (name, incarnation, version, commit_id, data) VALUES {_marks(5, count)}"  # noqa: S608
        " ON CONFLICT (name) DO UPDATE SET incarnation = excluded.incarnation, version = excluded.version,"
        " commit_id = excluded.commit_id, data = excluded.data"
    )


@cache
def _insert_receipts(count: int) -> str:
    return (  # REPLACE: an expired receipt of the same key may not have been purged yet
        "INSERT OR REPLACE INTO receipts (incarnation, key, fingerprint, version, batch, payload, expires)"  # noqa: S608
        f" VALUES {_marks(7, count)}"
    )


def _marks(columns: int, rows: int, row: str = "") -> str:
    return ", ".join([row or f"({', '.join('?' * columns)})"] * rows)


def _flat(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [value for row in rows for value in row]


def _filled_up(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The rows in as few parts as can be, each of 1, 2, 4, ... rows: the last one may be there several times."""
    for begin in range(0, len(rows), _MOST):
        part = [*rows[begin : begin + _MOST]]
        yield part + part[-1:] * ((1 << (len(part) - 1).bit_length()) - len(part))


def _parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The rows in parts of 1, 2, 4, ... rows."""
    begin = 0
    while (left := len(rows) - begin) > 0:
        count = min(_MOST, 1 << (left.bit_length() - 1))
        yield rows[begin : begin + count]
        begin += count

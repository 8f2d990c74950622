"""The operations of the store protocol as SQL statements, to be run inside a transaction."""

from __future__ import annotations

import gc
import math
import sqlite3
import weakref
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import (
    HEAD_BYTES,
    Committed,
    Conflict,
    Duplicates,
    Entry,
    Exists,
    Full,
    GroupStatus,
    Missing,
    Pinned,
    Receipt,
    ReceiptWithTTL,
    Record,
    Shard,
    Stamp,
    Unchanged,
)
from batchnorm_service.store.sqlite import attachments, history, statements
from batchnorm_service.store.sqlite.statements import load_record, load_stamp

SCHEMA: Final = (
    # The stamp's columns precede the data, so that reading them touches one page, however large the data is.
    """
    CREATE TABLE layers (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE COLLATE BINARY,
        incarnation INTEGER NOT NULL,
        version INTEGER NOT NULL,
        commit_id INTEGER NOT NULL,
        data BLOB NOT NULL
    )
    """,
    # A receipt belongs to an incarnation, not to a name: deleting a layer is O(1), because its receipts can never match
    # again and are purged when they expire. `expires` is in whole seconds since the epoch. New rows are appended to the
    # table and to the index by expiry. In the index by key, entries are short, and the key is the first column because
    # keys that the service generates ascend across layers.
    """
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
    """,
    # Shards of open groups: small, few, and deleted when their group closes.
    """
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
    """,
    "CREATE INDEX shards_by_expiry ON shards (expires)",
    "CREATE INDEX receipts_by_expiry ON receipts (expires)",
    # The number of layers (counting rows is O(n)), and the largest version of any deleted layer: new layers start above
    # it, so that versions never repeat for a name.
    "CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), layers INTEGER NOT NULL, floor INTEGER NOT NULL)",
    "INSERT INTO meta (id, layers, floor) VALUES (1, 0, 0)",
    *history.SCHEMA,
    *attachments.SCHEMA,
)

_PURGE_STEP: Final = 100


class Commit(NamedTuple):
    """The arguments of `Store.commit`."""

    name: str
    expected: Stamp
    record: Record | None
    receipts: Sequence[Receipt]
    keep: int


class SqliteTable:
    """The store operations on a connection.

    Args:
        receipt_seconds: time to live of receipts, rounded up to a whole second.
        runtime: its wall clock determines when receipts expire, because they outlive the process.
    """

    def __init__(self, receipt_seconds: float, runtime: Runtime) -> None:
        self._receipt_seconds = receipt_seconds
        self._runtime = runtime

    def load(self, connection: sqlite3.Connection, name: str, unless: Stamp | None) -> Record | Unchanged | Missing:
        """See `Store.load`."""
        if unless is not None and load_stamp(connection, name) == unless:
            return Unchanged()
        return load_record(connection, name) or Missing()

    def create(self, connection: sqlite3.Connection, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """See `Store.create`."""
        if (present := load_record(connection, name)) is not None:
            return Exists(present)
        layers, floor = connection.execute("SELECT layers, floor FROM meta").fetchone()
        if layers >= limit:
            return Full()
        record = Record(Stamp(self._runtime.bits(63), floor + 1, self._runtime.bits(63)), data)
        connection.execute(
            "INSERT INTO layers (name, incarnation, version, commit_id, data) VALUES (?, ?, ?, ?, ?)",
            (name, *record.stamp, data),
        )
        connection.execute("UPDATE meta SET layers = layers + 1")
        return record

    def commit(
        self, connection: sqlite3.Connection, commits: Sequence[Commit]
    ) -> list[Committed | Conflict | Missing | Duplicates]:
        """See `Store.commit`. Several commits, of different names, with few statements for all of them."""
        present = statements.stamps(connection, [commit.name for commit in commits])
        now = self._runtime.wall()
        keys = [
            (present[commit.name].incarnation, receipt.key)
            for commit in commits
            if commit.name in present
            for receipt in commit.receipts
        ]
        existing = statements.unexpired(connection, keys, now)
        outcomes = [_outcome(connection, commit, present.get(commit.name), existing) for commit in commits]
        done = [commit for commit, outcome in zip(commits, outcomes, strict=True) if isinstance(outcome, Committed)]
        for commit in done:
            if commit.keep > 0 and commit.record is not None:
                history.keep_newest(connection, commit.name)
                history.trim(connection, commit.expected.incarnation, commit.keep)
        statements.update_records(connection, [(commit.name, commit.record) for commit in done if commit.record])
        expires = math.ceil(now + self._receipt_seconds)
        statements.insert_receipts(
            connection,
            [(commit.expected.incarnation, *receipt, expires) for commit in done for receipt in commit.receipts],
        )
        return outcomes

    def find_receipts(
        self, connection: sqlite3.Connection, name: str, incarnation: int, keys: Sequence[bytes]
    ) -> tuple[Receipt, ...] | Missing:
        """See `Store.find_receipts`."""
        present = load_stamp(connection, name)
        if present is None or present.incarnation != incarnation:
            return Missing()
        found = statements.unexpired(connection, [(incarnation, key) for key in keys], self._runtime.wall())
        return tuple(found.values())

    def delete(
        self, connection: sqlite3.Connection, name: str, expected: Stamp, with_pins: bool
    ) -> Committed | Conflict | Missing | Pinned:
        """See `Store.delete`."""
        present = load_stamp(connection, name)
        if present is None:
            return Missing()
        if present != expected:
            return Conflict()
        if not with_pins and history.has_pins(connection, present.incarnation):
            return Pinned()
        connection.execute("DELETE FROM layers WHERE name = ?", (name,))
        history.delete_history(connection, present.incarnation)
        attachments.delete_attachments(connection, present.incarnation)
        connection.execute("UPDATE meta SET layers = layers - 1, floor = max(floor, ?)", (present.version,))
        return Committed()

    def join(
        self, connection: sqlite3.Connection, name: str, incarnation: int, group: bytes, size: int, shard: Shard
    ) -> GroupStatus | Missing:
        """See `Store.join`."""
        present = load_stamp(connection, name)
        if present is None or present.incarnation != incarnation:
            return Missing()
        now = self._runtime.wall()
        connection.execute("DELETE FROM shards WHERE expires <= ?", (now,))
        found = _group_status(connection, incarnation, group, now)
        opened, members = (size, {}) if found is None else (found.size, found.members)
        if opened == size and shard.member not in members and len(members) < size:
            expires = math.ceil(now + self._receipt_seconds)
            connection.execute(
                "INSERT INTO shards (incarnation, grp, member, size, fingerprint, part, expires)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (incarnation, group, shard.member, size, shard.fingerprint, shard.part, expires),
            )
            found = _group_status(connection, incarnation, group, now, added=True)
        return found or GroupStatus(size, {}, ())

    def find_group(
        self, connection: sqlite3.Connection, name: str, incarnation: int, group: bytes, member: bytes
    ) -> GroupStatus | Missing | None:
        """The result of `join` for a member that has joined already; None for others."""
        present = load_stamp(connection, name)
        if present is None or present.incarnation != incarnation:
            return Missing()
        found = _group_status(connection, incarnation, group, self._runtime.wall())
        return None if found is None or member not in found.members else found

    def leave(self, connection: sqlite3.Connection, incarnation: int, group: bytes, member: bytes | None) -> None:
        """See `Store.leave`."""
        connection.execute(
            "DELETE FROM shards WHERE incarnation = ? AND grp = ? AND member = coalesce(?, member)",
            (incarnation, group, member),
        )

    def list(self, connection: sqlite3.Connection, prefix: str, after: str, limit: int) -> list[Entry]:
        """See `Store.list`."""
        rows = connection.execute(
            "SELECT name, incarnation, version, commit_id, id FROM layers"
            " WHERE name >= ? AND name > ? ORDER BY name LIMIT ?",
            (prefix, after, max(limit, 0)),  # in SQLite, a negative limit means no limit
        )
        entries: list[Entry] = []
        for name, incarnation, version, commit_id, row in rows:
            if not name.startswith(prefix):  # the rows are sorted: no later name does
                break
            # `substr(data, 1, n)` would read each blob completely.
            with connection.blobopen("layers", "data", row, readonly=True) as blob:
                entries.append(Entry(name, Stamp(incarnation, version, commit_id), blob.read(HEAD_BYTES)))
        _forget_closed_blobs(connection)
        return entries

    def receipts(self, connection: sqlite3.Connection, after: int, limit: int) -> tuple[Sequence[ReceiptWithTTL], int]:
        """Up to `limit` unexpired receipts after the row id `after`, and the last row id."""
        now = self._runtime.wall()
        rows = connection.execute(
            "SELECT id, incarnation, expires, key, fingerprint, version, batch, payload FROM receipts"
            " WHERE id > ? AND expires > ? ORDER BY id LIMIT ?",
            (after, now, limit),
        ).fetchall()
        return [ReceiptWithTTL(row[1], Receipt(*row[3:]), row[2] - now) for row in rows], rows[-1][0] if rows else after

    def import_receipts(
        self, connection: sqlite3.Connection, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
    ) -> Committed | Missing:
        """See `Store.import_receipts`."""
        present = load_stamp(connection, name)
        if present is None or present.incarnation != incarnation:
            return Missing()
        now = self._runtime.wall()
        existing = statements.unexpired(connection, [(incarnation, each.receipt.key) for each in receipts], now)
        statements.insert_receipts(
            connection,
            [
                (incarnation, *receipt, math.ceil(now + seconds))
                for _, receipt, seconds in receipts
                if (incarnation, receipt.key) not in existing
            ],
        )
        return Committed()

    def purge(self, connection: sqlite3.Connection, changes: int) -> None:
        """Delete some expired receipts: more than `changes`, so that they are purged faster than new ones are added."""
        connection.execute(
            "DELETE FROM receipts WHERE id IN (SELECT id FROM receipts WHERE expires <= ? ORDER BY expires LIMIT ?)",
            (self._runtime.wall(), _PURGE_STEP + changes),
        )


def _forget_closed_blobs(connection: sqlite3.Connection) -> None:
    """Remove the weak references to closed blobs, which Python's sqlite3 keeps until the connection is closed."""
    for each in gc.get_referents(connection):
        if type(each) is list and each and isinstance(each[0], weakref.ref):
            each[:] = [reference for reference in each if reference() is not None]


def _outcome(
    connection: sqlite3.Connection, commit: Commit, present: Stamp | None, existing: Mapping[tuple[int, bytes], Receipt]
) -> Committed | Conflict | Missing | Duplicates:
    if present is None:
        return Missing()
    keys = dict.fromkeys((present.incarnation, receipt.key) for receipt in commit.receipts)
    if duplicates := tuple(existing[key] for key in keys if key in existing):
        return Duplicates(duplicates)
    if present != commit.expected:
        return Conflict(
            load_record(connection, commit.name) if present.incarnation == commit.expected.incarnation else None
        )
    return Committed()


def _group_status(
    connection: sqlite3.Connection, incarnation: int, group: bytes, now: float, *, added: bool = False
) -> GroupStatus | None:
    parameters = (incarnation, group, now)
    found = connection.execute(
        "SELECT member, fingerprint, size FROM shards"
        " WHERE incarnation = ? AND grp = ? AND expires > ? ORDER BY member",
        parameters,
    ).fetchall()
    if not found:
        return None
    members = {member: fingerprint for member, fingerprint, _ in found}
    opened: int = found[0][2]
    parts: tuple[bytes, ...] = ()
    if len(members) == opened:
        rows = connection.execute(
            "SELECT part FROM shards WHERE incarnation = ? AND grp = ? AND expires > ? ORDER BY member", parameters
        )
        parts = tuple(part for (part,) in rows)
    return GroupStatus(opened, members, parts, added)

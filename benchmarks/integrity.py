"""How long the check of an SQLite file at start, and a backup, take: `python -m benchmarks.integrity`.

Each file has 100 MiB. "From disk" means that the file was dropped from the page cache before (Linux).
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from batchnorm_service.store.sqlite.copies import check, copy_file
from batchnorm_service.store.sqlite.table import SCHEMA

_BYTES: Final = 100 << 20
_LAYER: Final = "INSERT INTO layers (name, incarnation, version, commit_id, data) VALUES (?, ?, ?, ?, ?)"
_RECEIPT: Final = (
    "INSERT INTO receipts (incarnation, key, fingerprint, version, batch, payload, expires)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)


def main() -> None:
    """Print a line for each file."""
    with tempfile.TemporaryDirectory() as directory:
        for what, statement, row, size in (
            ("layers of 100 KiB", _LAYER, lambda number: _layer(number, 100 << 10), 100 << 10),
            ("layers of 1 KiB", _LAYER, lambda number: _layer(number, 1 << 10), 1 << 10),
            ("receipts", _RECEIPT, _receipt, 100),
        ):
            path = Path(directory) / f"{size}.db"
            _make(path, statement, (row(number) for number in range(_BYTES // size)))
            cached = _seconds(lambda path=path: _check(path))  # type: ignore[misc]
            _drop(path)
            read = _seconds(lambda path=path: _check(path))  # type: ignore[misc]
            copied = _seconds(lambda path=path: copy_file(path, path.with_suffix(".copy"), lambda *_: None))  # type: ignore[misc]
            total = path.stat().st_size >> 20
            print(f"{what:20} {total} MiB: check {cached:.2f} s cached, {read:.2f} s from disk; copy {copied:.2f} s")


def _layer(number: int, size: int) -> tuple[object, ...]:
    return f"layer-{number}", secrets.randbits(63), 1, secrets.randbits(63), secrets.token_bytes(size)


def _receipt(number: int) -> tuple[object, ...]:
    return 1, secrets.token_bytes(16), secrets.token_bytes(16), number, number, b"", number


def _make(path: Path, statement: str, rows: Iterator[tuple[object, ...]]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for each in SCHEMA:
            connection.execute(each)
        connection.executemany(statement, rows)
        connection.commit()


def _check(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA cache_size = -32768")
        check(connection, path)


def _drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

"""The command `batchnorm-service`, with faults that a test asks for: `faulty_service.py DIRECTORY serve --port 8001`.

Files in DIRECTORY ask for them:

    kill    kills the process before a statement of the next transaction that writes: the number of the statement, where
            BEGIN is 0 and SELECT does not count; "copy": in the middle of a copy of the database; "rename", "renamed":
            before or after a file is replaced. The file is removed, and what the process was about to do is written to
            `died`.
    clock   seconds by which the wall clock is wrong

A service that was killed is started again, as a copy of a process that has imported everything, because that is fast.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from batchnorm_service.cli import app
from batchnorm_service.runtime import Runtime

DIRECTORY = Path(sys.argv[1])
KILL, CLOCK, DIED = DIRECTORY / "kill", DIRECTORY / "clock", DIRECTORY / "died"


def die_at(point: str, doing: str) -> None:
    """Kill this process if that was asked for."""
    if KILL.exists() and KILL.read_text() == point:
        KILL.unlink()
        DIED.write_text(doing)
        os.kill(os.getpid(), signal.SIGKILL)


class Connection(sqlite3.Connection):
    """Counts the statements of a transaction, with one more after its COMMIT."""

    count: int | None = None

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:  # type: ignore[override]
        if sql == "BEGIN IMMEDIATE":
            self.count = 0
        if self.count is None or sql.startswith("SELECT"):
            return super().execute(sql, parameters)
        die_at(str(self.count), " ".join(sql.split()[:5]))
        self.count += 1
        cursor = super().execute(sql, parameters)
        if sql == "COMMIT":
            die_at(str(self.count), "after COMMIT")
        if sql in {"COMMIT", "ROLLBACK"}:
            self.count = None
        return cursor

    def backup(self, target: sqlite3.Connection, *, pages: int, progress: Callable[[int, int, int], object]) -> None:  # type: ignore[override]
        def between(status: int, left: int, total: int) -> None:
            die_at("copy", "copy")
            progress(status, left, total)

        super().backup(target, pages=1, progress=between)


def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
    return plain_connect(*arguments, **options, factory=Connection)


def replace(source: Path, target: Path) -> Path:
    die_at("rename", "rename")
    replaced = plain_replace(source, target)
    die_at("renamed", "renamed")
    return replaced


def wall() -> float:
    return time.time() + (float(CLOCK.read_text()) if CLOCK.exists() else 0.0)


plain_connect, plain_replace = sqlite3.connect, Path.replace
sqlite3.connect = connect  # type: ignore[assignment]
Path.replace = replace  # type: ignore[assignment, method-assign]
Runtime.wall = staticmethod(wall)

if sys.argv[2] != "serve":
    app(sys.argv[2:])
import_module("batchnorm_service.server")
import_module("batchnorm_service.workers")
while True:
    if not (child := os.fork()):
        app(sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda number, _, child=child: os.kill(child, number))
    if (status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) != -signal.SIGKILL:
        sys.exit(status)

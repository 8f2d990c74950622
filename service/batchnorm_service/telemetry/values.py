"""The numbers behind the metrics: a row of float64 for each process of a service, which all of them can read."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)
_ITEM: Final = 8  # bytes of a float64


class Values:
    """The row of this process and those of the others.

    Rows are files that are mapped into memory: what a process has written stays when it is killed. A process holds a
    lock on its row, so the kernel tells which processes live. One that starts takes over the row of a dead one, and
    counts on from there; so counters never go down, and there are no more rows than processes at one time.

    Args:
        size: how many numbers a row has; the same in all processes.
        directory: of the rows; None if there is one process only, whose row is then in its memory.

    Attributes:
        own: the row of this process, (size,) float64.
    """

    def __init__(self, size: int, directory: Path | None = None) -> None:
        self._size = size
        self._directory = directory
        self._number = 0
        self.own = memoryview(bytearray(_ITEM * size)).cast("d")
        if directory is not None:
            try:
                self.own = self._claim(directory)
            except (OSError, ValueError) as error:  # ValueError: mmap's, if the file could not be written in full
                self._directory = None
                _log.warning("metrics of this process are its own, because they cannot be shared: %s", error)

    def rows(self) -> Iterator[tuple[memoryview[float], bool]]:
        """The rows of all processes, and whether the process lives; first the own row."""
        yield self.own, True
        if self._directory is None:
            return
        for path in sorted(self._directory.glob("*.row")):
            if path.name != _name(self._number):
                with path.open("rb") as file:
                    if len(data := file.read()) == _ITEM * self._size:
                        yield memoryview(data).cast("d"), not _lock(file.fileno(), fcntl.LOCK_SH)

    def _claim(self, directory: Path) -> memoryview[float]:
        """The first row that no living process has, or a new one."""
        for self._number in count():
            file = os.open(directory / _name(self._number), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if _lock(file, fcntl.LOCK_EX):
                    # Written, not truncated to its size: a write to a hole of the file would kill on a full disk.
                    os.pwrite(file, bytes(_ITEM * self._size - (filled := os.fstat(file).st_size)), filled)
                    # The map keeps a descriptor of its own, and with it the lock.
                    return memoryview(mmap.mmap(file, _ITEM * self._size)).cast("d")
            finally:
                os.close(file)
        raise AssertionError("count() does not end")


def _name(number: int) -> str:
    return f"{number:04}.row"


def _lock(file: int, kind: int) -> bool:
    """Lock a file, or return False if another process has it locked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

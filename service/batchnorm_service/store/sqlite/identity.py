"""Whether the files that SQLite has open are still those that a restart would find.

A database that is deleted, moved or replaced while it is open goes on taking commits, which nobody would ever see
again; without its write-ahead log, all commits since the last checkpoint are gone; and without the shared memory that
locks it, another process would write to it at the same time.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Final, NamedTuple

from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import StoreError, StoreLostError, StoreRefusedError

_log = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 1.0  # how old a check may be for another commit to rest on it
_DESCRIPTORS: Final = Path("/dev/fd")


class FileId(NamedTuple):
    """What tells a file from every other, whatever its name."""

    device: int
    inode: int


FileIds = tuple[FileId, ...]
"""Of the database, of its write-ahead log, and of its shared memory if it has any."""


class SqliteFiles:
    """The files of one database.

    Args:
        path: of the database, without symbolic links: SQLite's other files are beside it.
        given: how it was named: where symbolic links lead may change, too.
        shared: several processes use it, through a file of shared memory.
        runtime: its clock tells how old a check is.

    Attributes:
        ids: of the files that were opened; empty before.
        expected: which files to open, and no others; None opens any.
        lost: whether they were found to be gone or replaced. It stays so.
    """

    def __init__(self, path: Path, given: Path, *, shared: bool, runtime: Runtime = RUNTIME) -> None:
        self.path: Final = path
        self.ids: FileIds = ()
        self.expected: FileIds | None = None
        self.lost = False
        self._given: Final = given
        self._names: Final = (path, Path(f"{path}-wal"), *([Path(f"{path}-shm")] if shared else []))
        self._runtime = runtime
        self._checked = -math.inf
        self._due = False

    def opening(self) -> None:
        """Forget what was open before. Raises `StoreRefusedError` when other files are there than those expected."""
        self.ids, self.lost, self._checked = (), False, -math.inf
        if self.expected is not None:
            self._check_expected(self._there())

    def opened(self) -> None:
        """Note what was opened. Raises `StoreRefusedError` when it was replaced meanwhile, or is not as expected."""
        there = self._there()
        if not there or not set(there) <= _open_files(there):
            raise StoreRefusedError(f"{self.path} was replaced while it was opened")
        self._check_expected(there)
        self.ids, self._checked = there, self._runtime.now()

    def request(self) -> None:
        """Let the next `verify` check, however new the last check is."""
        self._due = True

    def verify(self) -> None:
        """Check, unless that was done within the last second.

        Raises:
            StoreLostError: the files are gone or replaced, or were at an earlier check.
            StoreError: they cannot be checked.
        """
        now = self._runtime.now()
        if not self.lost and (self._due or now - self._checked >= _CHECK_SECONDS):
            self._due = False  # before the files are looked at: a request that comes meanwhile counts for the next time
            self.lost = self._there() != self.ids
            self._checked = now
            if self.lost:
                _log.error("%s was deleted, moved or replaced; nothing is stored until the service restarts", self.path)
        if self.lost:
            raise StoreLostError("the SQLite file was deleted, moved or replaced while it was served")

    def _there(self) -> FileIds:
        """What is at the path now; empty when something is missing. Raises `StoreError`: that cannot be told.

        A restart follows symbolic links to the database and looks for the log beside what they lead to. So they must
        lead where they did, and what is there must be no link itself.
        """
        try:
            if os.path.realpath(self._given) != str(self.path):
                return ()
            return tuple(_id(os.lstat(name)) for name in self._names)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise StoreError(f"the SQLite file cannot be checked: {os.strerror(error.errno or 0)}") from error

    def _check_expected(self, there: FileIds) -> None:
        if self.expected is not None and there != self.expected:
            raise StoreRefusedError(
                f"{self.path} is not the file that the service was started with: it was deleted, moved or replaced"
            )


def _id(found: os.stat_result) -> FileId:
    return FileId(found.st_dev, found.st_ino)


def _open_files(otherwise: FileIds) -> set[FileId]:
    """The files that this process has open; `otherwise` on a system that does not tell."""
    if not _DESCRIPTORS.is_dir():
        return set(otherwise)
    found = set()
    for name in os.listdir(_DESCRIPTORS):
        try:
            found.add(_id(os.fstat(int(name))))
        except OSError:  # closed meanwhile: at least the one that the listing itself took
            continue
    return found

"""Checks that the files that SQLite has open are still those at their paths.

A database file that is deleted, moved or replaced while open still accepts commits, which are lost at the next start.
Without its write-ahead log, all commits since the last checkpoint are lost. Without its shared memory, which has its
locks, another process could write at the same time.
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

_CHECK_SECONDS: Final = 1.0  # how long a check is valid
_DESCRIPTORS: Final = Path("/dev/fd")


class FileId(NamedTuple):
    """Identity of a file, independent of its name."""

    device: int
    inode: int


FileIds = tuple[FileId, ...]
"""Ids of the database, its write-ahead log, and its shared memory, if any."""


class SqliteFiles:
    """Identity check of one database's files.

    Args:
        path: of the database, with symbolic links resolved; SQLite's other files are next to it.
        given: the path as given by the user: the targets of its symbolic links may change.
        shared: whether several processes use the database, so that it has a file of shared memory.
        runtime: its clock determines the age of a check.

    Attributes:
        ids: ids of the opened files; empty if not open.
        expected: the only files that may be opened; None for any.
        lost: whether the files were found deleted, moved or replaced; permanent until the next open.
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
        self._check_forced = False

    def before_open(self) -> None:
        """Reset the state. Raises `StoreRefusedError` if the files are not those expected."""
        self.ids, self.lost, self._checked = (), False, -math.inf
        if self.expected is not None:
            self._check_expected(self._current_ids())

    def after_open(self) -> None:
        """Record the opened files. Raises `StoreRefusedError` if they were replaced meanwhile, or are not expected."""
        current = self._current_ids()
        if not current or not set(current) <= _open_files(current):
            raise StoreRefusedError(f"{self.path} was replaced while it was opened")
        self._check_expected(current)
        self.ids, self._checked = current, self._runtime.now()

    def force_check(self) -> None:
        """Make the next `verify` check, even if the last check is still valid."""
        self._check_forced = True

    def verify(self) -> None:
        """Check the files, unless the last check is still valid.

        Raises:
            StoreLostError: they are deleted, moved or replaced, or were at an earlier check.
            StoreError: they cannot be checked.
        """
        now = self._runtime.now()
        if not self.lost and (self._check_forced or now - self._checked >= _CHECK_SECONDS):
            self._check_forced = False  # before the check, so that `force_check` during it applies to the next one
            self.lost = self._current_ids() != self.ids
            self._checked = now
            if self.lost:
                _log.error("%s was deleted, moved or replaced; nothing is stored until the service restarts", self.path)
        if self.lost:
            raise StoreLostError("the SQLite file was deleted, moved or replaced while it was served")

    def _current_ids(self) -> FileIds:
        """Ids of the files at their paths now; empty if one is missing. Raises `StoreError` if they cannot be read.

        A restart would resolve symbolic links to the database, and look for the log next to their target. So the links
        must still have the same target, and the files themselves must not be links.
        """
        try:
            if os.path.realpath(self._given) != str(self.path):
                return ()
            return tuple(_id(os.lstat(name)) for name in self._names)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise StoreError(f"the SQLite file cannot be checked: {os.strerror(error.errno or 0)}") from error

    def _check_expected(self, current: FileIds) -> None:
        if self.expected is not None and current != self.expected:
            raise StoreRefusedError(
                f"{self.path} is not the file that the service was started with: it was deleted, moved or replaced"
            )


def _id(stat: os.stat_result) -> FileId:
    return FileId(stat.st_dev, stat.st_ino)


def _open_files(default: FileIds) -> set[FileId]:
    """The files that this process has open; `default` on systems without /dev/fd."""
    if not _DESCRIPTORS.is_dir():
        return set(default)
    ids = set()
    for name in os.listdir(_DESCRIPTORS):
        try:
            ids.add(_id(os.fstat(int(name))))
        except OSError:  # closed meanwhile, such as the descriptor of the listing itself
            continue
    return ids

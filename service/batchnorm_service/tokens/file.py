"""The token file: changed under a lock by atomic replacement, and read again when it has changed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pwd
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from batchnorm_service.runtime import RUNTIME, Runtime

from .grants import Scope
from .stored import MAX_FILE_BYTES, StoredToken, TokenFileError, format_tokens, new_token, parse_tokens

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 1.0
"""How long a check of the file is valid. The contract: a change is noticed within two seconds."""


class _Signature(NamedTuple):
    """What changes whenever the file is replaced or written."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class TokenFile:
    """The tokens of a file, read again by the next use that is more than a second after the last check.

    No thread or timer is needed for it. While the file is damaged or missing, the tokens that were read last stay
    valid, and an error is logged.

    Args:
        path: the file.
        runtime: the clock.

    Raises:
        TokenFileError: the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path, runtime: Runtime = RUNTIME) -> None:
        self._path = path
        self._now = runtime.now
        self._tokens, self._signature = _read(path)
        self._checked_at = self._now()
        self._problem = ""

    def current(self) -> Mapping[str, StoredToken]:
        """The valid tokens by id: the same object as long as the file does not change."""
        now = self._now()
        if now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            self._refresh()
        return self._tokens

    def _refresh(self) -> None:
        try:
            if _signature(os.stat(self._path)) != self._signature:
                self._tokens, self._signature = _read(self._path)
                log.info("read %s again: %d tokens", self._path, len(self._tokens))
            problem = ""
        except OSError as error:
            problem = f"{self._path}: {error.strerror}"
        except TokenFileError as error:
            problem = str(error)
        if problem and problem != self._problem:
            log.error("%s; the tokens that were read before stay valid", problem)
        self._problem = problem


def load_tokens(path: Path) -> dict[str, StoredToken]:
    """The tokens of a file, by id. Raises `TokenFileError`."""
    return _read(path)[0]


def create_file(path: Path) -> str | None:
    """Make the file with one admin token, and return this token; None if the file exists.

    Several processes may call it at once: only one of them gets a token.

    Raises:
        TokenFileError: it cannot be written.
    """
    if path.exists():  # it may be in a directory that is read-only
        return None
    with _locked(path) as real:
        if real.exists():
            return None
        token, stored = new_token(Scope.ADMIN)
        _write(real, [stored])
        return token


def add_token(path: Path, scope: Scope, prefix: str) -> tuple[str, StoredToken]:
    """Add a new token to the file, which is made if it is missing; return the token and its stored form.

    Raises:
        TokenFileError: the file is damaged or full, or cannot be written.
    """
    with _locked(path) as real:
        tokens = load_tokens(real) if real.exists() else {}
        token, stored = new_token(scope, prefix)
        _write(real, [*tokens.values(), stored])
        return token, stored


def revoke_token(path: Path, token_id: str) -> bool:
    """Remove a token from the file; whether there was one with this id.

    Raises:
        TokenFileError: the file is damaged, or cannot be read or written.
    """
    with _locked(path) as real:
        tokens = load_tokens(real)
        if tokens.pop(token_id, None) is None:
            return False
        _write(real, tokens.values())
        return True


def _read(path: Path) -> tuple[dict[str, StoredToken], _Signature]:
    try:
        # A named pipe would block the open.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TokenFileError(f"{path}: not a regular file")
            data = file.read(MAX_FILE_BYTES + 1)
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            log.warning("%s: other users may write it, and so make tokens: chmod go-w", path)
    except OSError as error:
        raise TokenFileError(f"{path}: {_reason(path, error)}") from error
    try:
        return parse_tokens(data), _signature(status)
    except TokenFileError as error:
        raise TokenFileError(f"{path}: {error}") from None


def _signature(status: os.stat_result) -> _Signature:
    return _Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the lock of the file; the path without symbolic links, which a replacement would overwrite."""
    try:
        real = Path(os.path.realpath(path))
        real.parent.mkdir(parents=True, exist_ok=True)
        # The lock is on a file of its own, because the token file is replaced by another file.
        lock = os.open(real.with_name(f"{real.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _give_to_owner(real, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield real
        finally:
            os.close(lock)
    except OSError as error:
        raise TokenFileError(f"{path}: {_reason(path, error)}") from error


def _write(path: Path, tokens: Iterable[StoredToken]) -> None:
    """Replace the file atomically and durably, readable by its owner only."""
    data = format_tokens(tokens)
    if len(data) > MAX_FILE_BYTES:
        raise TokenFileError(f"{path}: would be larger than {MAX_FILE_BYTES} bytes; revoke tokens first")
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            _give_to_owner(path, descriptor)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    _sync_directory(path.parent)


def _give_to_owner(path: Path, descriptor: int) -> None:
    """Give a new file to the owner of the token file, or of its directory: the service could not read one of root's.

    Raises:
        TokenFileError: only root could.
    """
    owner = (path if path.exists() else path.parent).stat()
    if os.geteuid() == 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    elif path.exists() and owner.st_uid != os.geteuid():
        raise TokenFileError(
            f"{path} belongs to {describe_user(owner.st_uid)}, who could not read what"
            f" {describe_user(os.geteuid())} writes; run the command as its owner or as root"
        )


def _reason(path: Path, error: OSError) -> str:
    """What an error says, and why a file that is there cannot be used."""
    if isinstance(error, PermissionError):
        with contextlib.suppress(OSError):
            status = path.stat()
            mode = stat.S_IMODE(status.st_mode)
            return (
                f"{error.strerror}: it belongs to {describe_user(status.st_uid)} (mode {mode:04o}), and this process to"
                f" {describe_user(os.geteuid())}"
            )
    return str(error.strerror)


def describe_user(number: int) -> str:
    """The user with this number, by name if there is one."""
    with contextlib.suppress(KeyError):
        return f"user {pwd.getpwuid(number).pw_name}"
    return f"user {number}"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

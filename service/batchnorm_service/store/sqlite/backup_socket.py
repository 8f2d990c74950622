"""Backups of a locked file: the process that has it open makes them for others, over a Unix socket.

A request is one line of JSON, {"target": "/absolute/path"}. The reply has a line {"done": pages, "total": pages} now
and then, and ends with {"finished": true} or {"error": "why"}. Only the same user and root are served.

The socket's address is an abstract one, made of the file's device and inode: a process that is killed leaves nothing
behind, and no file lies beside the database. Only Linux has these addresses; elsewhere nothing is offered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.sqlite.copies import CopyProgress

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS: Final = 0.2
_REQUEST_SECONDS: Final = 10.0
_REPLY_SECONDS: Final = 60.0  # between two lines
_OFFERED: Final = sys.platform == "linux"


class BackupSocket:
    """Server of backups.

    Args:
        path: of the database.
        copy: writes a copy to a new file, and reports its progress from another thread.
        runtime: tasks and timeouts.
    """

    def __init__(
        self, path: Path, copy: Callable[[Path, CopyProgress], Coroutine[Any, Any, None]], runtime: Runtime
    ) -> None:
        self._runtime = runtime
        self._path = path
        self._copy = copy
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Start to serve. If that is not possible, log why."""
        if not _OFFERED:
            return
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(_address(self._path))
            self._server = await asyncio.start_unix_server(self._serve, sock=listener)
        except OSError as error:
            listener.close()
            _log.warning("%s: no backups while the service runs: %s", self._path, error)

    async def close(self) -> None:
        """Stop running backups, and remove the socket."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.current_task()
        assert call is not None  # noqa: S101 - a callback of asyncio's server
        self._calls.add(call)
        try:
            if not _may_ask(writer.get_extra_info("socket")):
                return
            async with self._runtime.timeout(_REQUEST_SECONDS):
                target = Path(json.loads(await reader.readline())["target"])
            await self._back_up(target, reader, writer)
        except (OSError, ValueError, KeyError, TypeError):  # the other process has ended, or is not one of ours
            pass
        finally:
            self._calls.discard(call)
            writer.close()

    async def _back_up(self, target: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pages = 0, 0

        def note(done: int, total: int) -> None:
            nonlocal pages
            pages = done, total
            if gone.done() or copying.cancelled():
                raise StoreError("nobody waits for the backup any more")

        async def send(**reply: Any) -> None:
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()

        gone = self._runtime.create_task(reader.read())
        copying = self._runtime.create_task(self._copy(target, note))
        try:
            while not (copying.done() or gone.done()):
                await asyncio.wait({copying, gone}, timeout=_PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                await send(done=pages[0], total=pages[1])
            _log.info("backup to %s", target)
            await copying
            await send(finished=True)
        except StoreError as error:
            await send(error=str(error))
        finally:
            copying.cancel()
            gone.cancel()
            await asyncio.wait({copying, gone})


def request_backup(path: Path, target: Path, progress: CopyProgress) -> bool:
    """Let the process that has a database locked write a copy of it to a new file; False if none offers to.

    Any process may take the socket's address before the service does. One of another user than root, the database's
    owner and this process's is not asked.

    Raises:
        StoreError: it failed.
    """
    if not _OFFERED:
        return False
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_REPLY_SECONDS)
        try:
            client.connect(_address(path))
        except ConnectionRefusedError:
            return False
        if _user(client) not in {0, os.geteuid(), os.stat(path).st_uid}:
            return False
        try:
            client.sendall(json.dumps({"target": str(target)}).encode() + b"\n")
            for line in client.makefile("rb"):
                reply = json.loads(line)
                if "error" in reply:
                    raise StoreError(f"the service cannot write {target}: {reply['error']}")
                if "finished" in reply:
                    return True
                progress(reply["done"], reply["total"])
        except OSError as error:
            raise StoreError(f"the service does not reply: {error}") from error
    raise StoreError("the service stopped during the backup")


def _address(path: Path) -> bytes:
    stat = os.stat(path)
    return b"\0batchnorm-backup-%d-%d" % (stat.st_dev, stat.st_ino)


def _may_ask(connection: socket.socket) -> bool:
    """Whether the other process belongs to the same user, or to root."""
    return _user(connection) in {0, os.geteuid()}


def _user(connection: socket.socket) -> int:
    """The user of the other process."""
    user: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return user

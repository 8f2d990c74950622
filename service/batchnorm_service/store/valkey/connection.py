"""Connections to servers, and the check whether a server is suitable."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from valkey.asyncio.cluster import ClusterParser
from valkey.asyncio.connection import Connection, SSLConnection
from valkey.exceptions import AuthenticationError, ResponseError, ValkeyError
from valkey.exceptions import TimeoutError as ValkeyTimeoutError

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreRefusedError
from batchnorm_service.store.valkey.address import Address, Node

FAULTS: Final = (ValkeyError, OSError)  # a TimeoutError is an OSError
"""Exceptions of a connection. One of them, `ResponseError`, is a reply: the connection stays usable."""

Command = Sequence[bytes | int]


class _Connection(Protocol):
    """The used part of valkey-py's connection class, which is untyped."""

    async def connect(self) -> None: ...
    async def disconnect(self, nowait: bool = False) -> None: ...
    async def can_read_destructive(self) -> bool: ...
    async def send_packed_command(self, command: Iterable[bytes], check_health: bool = True) -> None: ...
    async def read_response(self) -> Any: ...
    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]: ...


class ServerConnection:
    """Connection to a server. Its user reads one reply per sent command; if that fails, the connection is dropped.

    Attributes:
        node: the server.
        append_only: whether the server writes an append-only file.
    """

    def __init__(self, connection: _Connection, node: Node) -> None:
        self.node = node
        self.append_only = False
        self._connection = connection

    async def send(self, commands: Iterable[Command]) -> None:
        """Send commands together."""
        await self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)

    async def read_reply(self) -> Any:
        """The reply to the next command. Raises one of `FAULTS`."""
        return await self._connection.read_response()

    async def is_closed(self) -> bool:
        """Whether the server has closed the connection, as far as is known."""
        try:
            return await self._connection.can_read_destructive()
        except FAULTS:
            return True

    async def close(self) -> None:
        """Close the connection gracefully."""
        with contextlib.suppress(*FAULTS):
            await self._connection.disconnect()

    async def drop(self) -> None:
        """Close the connection immediately, in any state."""
        writer: asyncio.StreamWriter | None = getattr(self._connection, "_writer", None)
        if writer is not None:  # a plain close would first flush its buffer, perhaps forever
            writer.transport.abort()
        with contextlib.suppress(*FAULTS):
            await self._connection.disconnect(nowait=True)


class Connector:
    """Factory of connections.

    Args:
        address: the parsed URL.
        timeout: seconds that connecting may take.
        runtime: clock.
    """

    def __init__(self, address: Address, timeout: float, runtime: Runtime) -> None:
        self.runtime = runtime
        self.address = address
        self.timeout = timeout

    async def connect(self, node: Node) -> ServerConnection:
        """Connect to a server and check that it is suitable.

        Raises:
            StoreRefusedError: it cannot be reached or is not suitable; the message says why.
        """
        connection = ServerConnection(self._connection(node), node)
        try:
            async with self.runtime.timeout(self.timeout):
                await connection.send([(b"INFO",)])
                info = parse_info(await connection.read_reply())
        except FAULTS as error:
            await connection.drop()
            raise StoreRefusedError(f"{node}: {describe_error(error)}") from error
        except BaseException:
            await connection.drop()
            raise
        if fault := unfit(info, cluster=self.address.cluster):
            await connection.close()
            raise StoreRefusedError(f"{node} {fault}")
        connection.append_only = info.get("aof_enabled") == "1"
        return connection

    def _connection(self, node: Node) -> _Connection:
        address = self.address
        options: dict[str, Any] = {
            "host": node.host,
            "port": node.port,
            "db": address.database,
            "username": address.user,
            "password": address.password,
            "client_name": "batchnorm-service",
            "lib_name": None,  # each would cost a round trip
            "lib_version": None,
            "parser_class": ClusterParser,  # the default parser's errors, and redirections
            "socket_timeout": None,  # the users of the connection set timeouts
            "socket_connect_timeout": self.timeout,
            "socket_keepalive": True,
        }
        if not address.tls:
            return Connection(**options)  # type: ignore[no-untyped-call,no-any-return,unused-ignore]
        return SSLConnection(  # type: ignore[no-untyped-call,no-any-return,unused-ignore]
            ssl_cert_reqs="required", ssl_check_hostname=True, ssl_ca_certs=address.ca, **options
        )


def parse_info(text: bytes) -> dict[str, str]:
    """The fields of a server's reply to INFO."""
    pairs = (line.split(":", 1) for line in text.decode(errors="replace").splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def unfit(info: Mapping[str, str], *, cluster: bool) -> str | None:
    """Why a server is not suitable, as the predicate of a sentence about it; None if it is."""
    version = info.get("redis_version", "0")  # for Valkey, the version of Redis that it is compatible with
    policy = info.get("maxmemory_policy", "noeviction")
    clustered = info.get("cluster_enabled", "0") != "0"
    faults = {
        f"is Redis {version}; Redis 7.0 or any Valkey is needed": int(version.split(".")[0]) < 7,
        "is still loading its data": info.get("loading", "0") != "0",
        "is not in cluster mode: its URL is valkey://host:port/0": cluster and not clustered,
        "is a node of a cluster: its URL is valkey+cluster://host:port": clustered and not cluster,
        "is a replica: the URL must name its primary": not cluster and info.get("role") != "master",
        f"evicts keys when its memory is full (maxmemory-policy {policy}): layers and receipts would be lost;"
        " set maxmemory-policy to noeviction": policy != "noeviction",
    }
    return next((words for words, applies in faults.items() if applies), None)


def describe_error(error: BaseException) -> str:
    """A short description of an error, without any part of the URL."""
    if isinstance(error, AuthenticationError):
        return "a password is needed" if "required" in str(error) else "the server refuses the user or the password"
    if isinstance(error, TimeoutError | ValkeyTimeoutError):
        return "no answer in time"
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return f"its certificate cannot be trusted: {error.__context__.verify_message}"
    if isinstance(error.__context__, OSError) and (error.__context__.errno or 0) > 0:
        return os.strerror(error.__context__.errno or 0).lower()
    words = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ResponseError) and type(error) is not ResponseError:  # valkey-py strips the error code
        return f"{type(error).__name__.removesuffix('Error').upper()} {words}"
    return words

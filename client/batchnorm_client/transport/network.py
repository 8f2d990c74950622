"""Sockets that respect the deadline of the call that uses them.

httpx's timeouts apply to each read and write separately, so a peer that sends a byte now and then could keep a call
waiting for ever. These sockets replace httpcore's, and check before each wait how much time the call has left.
The async client uses them, too, instead of cancelling: httpcore leaks a connection that is cancelled in a TLS
handshake.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import httpcore


def _no_deadline() -> float:
    return math.inf


seconds_left: ContextVar[Callable[[], float]] = ContextVar("seconds_left", default=_no_deadline)
"""Returns the seconds that the call in this thread or task has left; infinite without a deadline."""


class DeadlineBackend(httpcore.SyncBackend):
    """TCP connections that respect `seconds_left`."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first of the host's addresses that accepts.

        The addresses are tried here, because the standard library would give each of them the whole timeout.
        """
        options = list(socket_options or ())
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        for address in dict.fromkeys(str(entry[4][0]) for entry in found):
            limit = _within(timeout, httpcore.ConnectTimeout)
            try:
                return _Stream(super().connect_tcp(address, port, limit, local_address, options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _Stream(httpcore.NetworkStream):
    """httpcore's stream over a socket, with and without TLS.

    Args:
        stream: httpcore's stream.
        nested: whether it is TLS inside of TLS; then the socket belongs to the outer stream.
    """

    def __init__(self, stream: httpcore.NetworkStream, nested: bool = False) -> None:
        self._stream = stream
        self._nested = nested
        self._socket: socket.socket = stream.get_extra_info("socket")

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Some bytes; none at the end."""
        return self._stream.read(max_bytes, _within(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write the whole buffer. httpcore's own loop would give each part the whole timeout."""
        if self._nested:
            self._stream.write(buffer, _within(timeout, httpcore.WriteTimeout))
            return
        view = memoryview(buffer)
        try:
            while view:
                self._socket.settimeout(_within(timeout, httpcore.WriteTimeout))
                view = view[self._socket.send(view) :]
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        """Close it. The shutdown wakes a thread that still reads from it, which closing alone does not."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same connection under TLS; the standard library bounds a handshake as a whole."""
        secured = self._stream.start_tls(ssl_context, server_hostname, _within(timeout, httpcore.ConnectTimeout))
        return _Stream(secured, nested=isinstance(self._socket, ssl.SSLSocket))

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks about the socket."""
        return self._stream.get_extra_info(info)


class AsyncDeadlineBackend(httpcore.AsyncNetworkBackend):
    """The same for asyncio.

    Args:
        backend: httpcore's. Its timeouts already apply to each of its methods as a whole.
    """

    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._backend = backend

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to one of the host's addresses."""
        limit = _within(timeout, httpcore.ConnectTimeout)
        return _AsyncStream(await self._backend.connect_tcp(host, port, limit, local_address, socket_options))

    async def sleep(self, seconds: float) -> None:
        """Between httpcore's own tries to connect."""
        await self._backend.sleep(seconds)


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        return await self._stream.read(max_bytes, _within(timeout, httpcore.ReadTimeout))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, _within(timeout, httpcore.WriteTimeout))

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        limit = _within(timeout, httpcore.ConnectTimeout)
        return _AsyncStream(await self._stream.start_tls(ssl_context, server_hostname, limit))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _within(timeout: float | None, late: type[httpcore.TimeoutException]) -> float | None:
    """The timeout, or the time until the deadline if that is less; raises `late` if the deadline has passed."""
    left = seconds_left.get()()
    if left <= 0:
        raise late("the deadline has passed")
    if timeout is None:
        return None if left == math.inf else left
    return min(timeout, left)

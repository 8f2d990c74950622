"""Sending: over connections that a client makes itself, one pool for each process, or over an HTTP client given to it.

A socket that two processes read from gives either the other's answers. So what was inherited by a fork is neither used
nor closed in the child: closing could take a connection's TLS session, or its place in an event loop, from the parent.

Connections are used through httpx's transports and not through its clients, which log a line at INFO for every call.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Final, Generic, TypeVar

import anyio
import httpx

from batchnorm_client.core import Attempts, Response
from batchnorm_client.transport.network import AsyncDeadlineBackend, DeadlineBackend, seconds_left
from batchnorm_client.transport.requests import ResponseBuffer, ServiceEndpoint
from batchnorm_client.wire.errors import BatchNormError, ConnectionFailed, NoAnswer, TimedOut

T = TypeVar("T")
G = TypeVar("G", httpx.Client, httpx.AsyncClient)

_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_PERMANENT: Final = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)

_inherited: list[object] = []
"""Pools of parent processes. Kept, because an event loop's sockets are taken from it when nobody has them any more."""


class _Connections(Generic[T, G]):
    """What both clients have in common.

    Args:
        endpoint: to the service.
        given: the HTTP client that was passed in, or None.
        make: makes a pool.
    """

    def __init__(self, endpoint: ServiceEndpoint, given: G | None, make: Callable[[], T]) -> None:
        self._endpoint = endpoint
        self._given: G | None = given
        self._make = make
        self._made_in = os.getpid()
        self._closed = False
        # By process id. setdefault lets two threads of a new child agree on one pool without a lock, which a fork could
        # inherit while it is held.
        self._pools: dict[int, T] = {}
        if given is None:
            self._pool()  # options that cannot be used are refused now

    def _pool(self) -> T:
        """The connections of this process.

        Raises:
            ConnectionFailed: the client is closed.
        """
        pid = os.getpid()
        pool = self._pools.get(pid)
        if pool is None:
            if self._closed:
                raise ConnectionFailed("the client is closed", permanent=True)
            # Also so that no descendant finds one when the system gives it an ancestor's number.
            _inherited.extend(self._pools.pop(other, None) for other in list(self._pools) if other != pid)
            pool = self._pools.setdefault(pid, self._make())
        return pool

    def _usable(self, given: G) -> G:
        """The HTTP client that was passed in.

        Raises:
            ConnectionFailed: it is closed, or was passed in before a fork.
        """
        if given.is_closed:
            raise ConnectionFailed("the HTTP client that was passed in is closed", permanent=True)
        if os.getpid() != self._made_in:
            raise ConnectionFailed(
                "the HTTP client that was passed in belongs to the process before the fork, and may share its "
                "connections; make a client in this process",
                permanent=True,
            )
        return given

    def _take_pool(self) -> T | None:
        """No more calls; the pool that is to be closed. An HTTP client that was passed in is left as it is."""
        self._closed = self._given is None
        return self._pools.pop(os.getpid(), None)

    @contextmanager
    def _errors(self, attempts: Attempts[Any]) -> Iterator[None]:
        """What goes wrong below, as exceptions of this package."""
        try:
            yield
        except BatchNormError:
            raise
        except Exception as error:
            if self._closed or (self._given is not None and self._given.is_closed):
                raise ConnectionFailed(
                    "the client was closed during the call", outcome_unknown=True, permanent=True
                ) from error
            if isinstance(error, httpx.TransportError | httpx.DecodingError):
                raise _no_answer(error, self._endpoint, attempts) from error
            raise


class Connections(_Connections[httpx.HTTPTransport, httpx.Client]):
    """Those of the client that blocks; may be shared by threads.

    Args:
        endpoint: to the service.
        given: the HTTP client that was passed in, or None.
    """

    def __init__(self, endpoint: ServiceEndpoint, given: httpx.Client | None) -> None:
        super().__init__(endpoint, given, lambda: _transport(endpoint))

    def send(self, attempts: Attempts[Any]) -> Response:
        """Send a call once.

        Raises:
            NoAnswer: none came, the deadline passed, or the client is closed.
        """
        given, pool = self._given, None
        if given is None:
            pool = self._pool()
            send = pool.handle_request
        else:
            send = partial(self._usable(given).send, stream=True)
        token = seconds_left.set(attempts.left)
        try:
            with self._errors(attempts):
                request = self._endpoint.build_request(attempts)
                response = send(request)
                try:
                    buffer = ResponseBuffer(response, attempts.remaining)
                    for part in response.iter_bytes():
                        buffer.add(part)
                finally:
                    response.close()
        finally:
            seconds_left.reset(token)
            if pool is not None and self._closed:  # meanwhile; this call's connection came back to the pool after that
                pool.close()
        return buffer.response()

    def close(self) -> None:
        """Close what was made here, in this process. Calls under way raise `ConnectionFailed`."""
        pool = self._take_pool()
        if pool is not None:
            pool.close()


class AsyncConnections(_Connections[httpx.AsyncHTTPTransport, httpx.AsyncClient]):
    """Those of the client that does not block.

    Args:
        endpoint: to the service.
        given: the HTTP client that was passed in, or None.
    """

    def __init__(self, endpoint: ServiceEndpoint, given: httpx.AsyncClient | None) -> None:
        super().__init__(endpoint, given, lambda: _async_transport(endpoint))

    async def send(self, attempts: Attempts[Any]) -> Response:
        """Send a call once.

        Raises:
            NoAnswer: none came, the deadline passed, or the client is closed.
        """
        given, pool = self._given, None
        if given is None:
            pool = self._pool()
            send = pool.handle_async_request
        else:
            send = partial(self._usable(given).send, stream=True)
        token = seconds_left.set(attempts.left)
        try:
            # An HTTP client that was passed in has sockets of its own, which look at no deadline.
            with self._errors(attempts), nullcontext() if given is None else anyio.move_on_after(attempts.left()):
                request = self._endpoint.build_request(attempts)
                response = await send(request)
                try:
                    buffer = ResponseBuffer(response, attempts.remaining)
                    async for part in response.aiter_bytes():
                        buffer.add(part)
                finally:
                    await response.aclose()
                return buffer.response()
        finally:
            seconds_left.reset(token)
            if pool is not None and self._closed:  # meanwhile; this call's connection came back to the pool after that
                await pool.aclose()
        raise attempts.timed_out()

    async def aclose(self) -> None:
        """Close what was made here, in this process. Calls under way raise `ConnectionFailed`."""
        pool = self._take_pool()
        if pool is not None:
            await pool.aclose()


def _transport(endpoint: ServiceEndpoint) -> httpx.HTTPTransport:
    transport = httpx.HTTPTransport(**endpoint.options)
    transport._pool._network_backend = DeadlineBackend()  # httpx has no option for httpcore's
    return transport


def _async_transport(endpoint: ServiceEndpoint) -> httpx.AsyncHTTPTransport:
    transport = httpx.AsyncHTTPTransport(**endpoint.options)
    transport._pool._network_backend = AsyncDeadlineBackend(transport._pool._network_backend)
    return transport


def _no_answer(
    error: httpx.TransportError | httpx.DecodingError, endpoint: ServiceEndpoint, attempts: Attempts[Any]
) -> NoAnswer:
    if isinstance(error, httpx.TimeoutException):
        return _timed_out(error, endpoint, attempts)
    text = str(error) or type(error).__name__
    if not isinstance(error, _NOT_SENT + _PERMANENT):
        return ConnectionFailed(f"the connection to {_route(error, endpoint)} was cut: {text}", outcome_unknown=True)
    permanent = isinstance(error, _PERMANENT) or _caused_by(error, ssl.SSLCertVerificationError)
    if endpoint.proxy is not None and not isinstance(error, _PERMANENT):
        if isinstance(error, httpx.ProxyError):
            return ConnectionFailed(
                f"{endpoint.proxy} did not connect to {endpoint.address}: {text}", proxy=str(endpoint.proxy)
            )
        if not _caused_by(error, ssl.SSLError):  # which may be the service's, at the end of a tunnel
            return ConnectionFailed(f"cannot reach {endpoint.proxy}: {text}", proxy=str(endpoint.proxy))
    return ConnectionFailed(f"cannot reach {_route(error, endpoint)}: {text}", permanent=permanent)


def _timed_out(error: httpx.TimeoutException, endpoint: ServiceEndpoint, attempts: Attempts[Any]) -> TimedOut:
    when = "in time" if attempts.left() > 0 else f"within the deadline of {attempts.deadline:g} s"
    match error:
        case httpx.ConnectTimeout() if endpoint.proxy is not None:
            return TimedOut(f"{endpoint.proxy} did not connect {when}", proxy=str(endpoint.proxy))
        case httpx.ConnectTimeout():
            return TimedOut(f"{_route(error, endpoint)} did not connect {when}")
        case httpx.PoolTimeout():
            return TimedOut(f"no connection of the pool became free {when}")
        case httpx.ReadTimeout():
            return TimedOut(f"{_route(error, endpoint)} did not answer {when}", outcome_unknown=True)
        case _:
            return TimedOut(f"{_route(error, endpoint)} did not take the request {when}", outcome_unknown=True)


def _route(error: httpx.TransportError | httpx.DecodingError, endpoint: ServiceEndpoint) -> str:
    """The service, and the proxy before it; of an HTTP client that was passed in, where it was redirected to."""
    try:
        url = error.request.url
    except RuntimeError:  # a transport's errors have no request
        return endpoint.address if endpoint.proxy is None else f"{endpoint.address} through {endpoint.proxy}"
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False

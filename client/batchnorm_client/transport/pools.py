"""Connection pools, one for each process; or the HTTP client that the caller passed in.

Two processes that read from one socket get each other's responses. So after a fork a child neither uses nor closes the
pools that it inherited: closing could end a TLS session of the parent, or remove a socket from its event loop.

This uses httpx's transports and not its clients, which log a line at INFO for every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import httpx

from batchnorm_client.core import Attempts
from batchnorm_client.transport.failures import no_response
from batchnorm_client.transport.network import AsyncDeadlineBackend, DeadlineBackend
from batchnorm_client.transport.requests import ServiceEndpoint
from batchnorm_client.wire.errors import BatchNormError, ConnectionFailed

T = TypeVar("T")
G = TypeVar("G", httpx.Client, httpx.AsyncClient)

_inherited: list[object] = []
"""Pools of parent processes. Kept, because a socket that is garbage collected is removed from its event loop."""


class PoolPerProcess(Generic[T, G]):
    """What the connections of both clients share: everything that need not be awaited.

    Args:
        endpoint: to the service.
        given: the HTTP client that was passed in, or None.
        make: makes a pool.

    Attributes:
        endpoint: as given.
        given: as given.
        closed: whether the client is closed; always False with an HTTP client that was passed in.
    """

    def __init__(self, endpoint: ServiceEndpoint, given: G | None, make: Callable[[], T]) -> None:
        self.endpoint = endpoint
        self.given: G | None = given
        self._make = make
        self._made_in = os.getpid()
        self.closed = False
        # By process id. setdefault lets two threads of a new child agree on one pool without a lock, which a fork could
        # inherit while it is held.
        self._pools: dict[int, T] = {}
        if given is None:
            self.pool()  # raises now if the options are invalid

    def pool(self) -> T:
        """The connections of this process.

        Raises:
            ConnectionFailed: the client is closed.
        """
        pid = os.getpid()
        pool = self._pools.get(pid)
        if pool is None:
            if self.closed:
                raise ConnectionFailed("the client is closed", permanent=True)
            # So that no descendant process finds a pool when it gets the process id of an ancestor.
            _inherited.extend(self._pools.pop(other, None) for other in list(self._pools) if other != pid)
            pool = self._pools.setdefault(pid, self._make())
        return pool

    def usable(self, given: G) -> G:
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

    def take_pool(self) -> T | None:
        """Refuse further calls, and return the pool to close. An HTTP client that was passed in is not closed."""
        self.closed = self.given is None
        return self._pools.pop(os.getpid(), None)

    @contextmanager
    def errors(self, attempts: Attempts[Any]) -> Iterator[None]:
        """Turns httpx's exceptions into those of this package."""
        try:
            yield
        except BatchNormError:
            raise
        except Exception as error:
            if self.closed or (self.given is not None and self.given.is_closed):
                raise ConnectionFailed(
                    "the client was closed during the call", outcome_unknown=True, permanent=True
                ) from error
            if isinstance(error, httpx.TransportError | httpx.DecodingError):
                raise no_response(error, self.endpoint, attempts) from error
            raise


def sync_transport(endpoint: ServiceEndpoint) -> httpx.HTTPTransport:
    """A pool of connections that respect deadlines."""
    transport = httpx.HTTPTransport(**endpoint.options)
    transport._pool._network_backend = DeadlineBackend()  # httpx has no option for httpcore's
    return transport


def async_transport(endpoint: ServiceEndpoint) -> httpx.AsyncHTTPTransport:
    """A pool of connections that respect deadlines."""
    transport = httpx.AsyncHTTPTransport(**endpoint.options)
    transport._pool._network_backend = AsyncDeadlineBackend(transport._pool._network_backend)
    return transport

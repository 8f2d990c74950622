# Generated from transport/async_connections.py by generate_sync.py (make sync-client): change that file, not this one.
"""Sending the calls of `Client`."""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx

from batchnorm_client.core import Attempts, Response
from batchnorm_client.transport.network import seconds_left
from batchnorm_client.transport.pools import PoolPerProcess, sync_transport
from batchnorm_client.transport.requests import ResponseBuffer, ServiceEndpoint
from batchnorm_client.transport.tracing import client_span


class Connections(PoolPerProcess[httpx.HTTPTransport, httpx.Client]):
    """Connections of `Client`; threads may share them.

    Args:
        endpoint: to the service.
        given: the HTTP client that was passed in, or None.
    """

    def __init__(self, endpoint: ServiceEndpoint, given: httpx.Client | None) -> None:
        super().__init__(endpoint, given, lambda: sync_transport(endpoint))

    def send(self, attempts: Attempts[Any]) -> Response:
        """Send a call once.

        Raises:
            NoAnswer: there was no response, the deadline passed, or the client is closed.
        """
        given, pool = self.given, None
        if given is None:
            pool = self.pool()
            send = pool.handle_request
        else:
            send = partial(self.usable(given).send, stream=True)
        token = seconds_left.set(attempts.left)
        try:
            with (
                client_span(attempts, self.endpoint.shown) as span,
                self.errors(attempts),
            ):
                request = self.endpoint.build_request(attempts, span.headers)
                response = send(request)
                try:
                    buffer = ResponseBuffer(response, attempts.remaining)
                    for part in response.iter_bytes():
                        buffer.add(part)
                finally:
                    response.close()
                return span.answered(buffer.response())
        finally:
            seconds_left.reset(token)
            if pool is not None and self.closed:  # during the call, whose connection returned to the pool after that
                pool.close()

    def close(self) -> None:
        """Close the connections that were made in this process. Running calls raise `ConnectionFailed`."""
        pool = self.take_pool()
        if pool is not None:
            pool.close()

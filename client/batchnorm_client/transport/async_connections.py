"""Sending the calls of `AsyncClient`."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import anyio
import httpx

from batchnorm_client.core import Attempts, Response
from batchnorm_client.transport.network import seconds_left
from batchnorm_client.transport.pools import PoolPerProcess, async_transport
from batchnorm_client.transport.requests import ResponseBuffer, ServiceEndpoint
from batchnorm_client.transport.tracing import client_span


class AsyncConnections(PoolPerProcess[httpx.AsyncHTTPTransport, httpx.AsyncClient]):
    """Connections of `AsyncClient`.

    Args:
        endpoint: to the service.
        given: the HTTP client that was passed in, or None.
    """

    def __init__(self, endpoint: ServiceEndpoint, given: httpx.AsyncClient | None) -> None:
        super().__init__(endpoint, given, lambda: async_transport(endpoint))

    async def send(self, attempts: Attempts[Any]) -> Response:
        """Send a call once.

        Raises:
            NoAnswer: there was no response, the deadline passed, or the client is closed.
        """
        given, pool = self.given, None
        if given is None:
            pool = self.pool()
            send = pool.handle_async_request
        else:
            send = partial(self.usable(given).send, stream=True)
        token = seconds_left.set(attempts.left)
        try:
            # An HTTP client that was passed in has its own sockets, which do not check the deadline.
            with (
                client_span(attempts, self.endpoint.shown) as span,
                self.errors(attempts),
                nullcontext() if given is None else anyio.move_on_after(attempts.left()),
            ):
                request = self.endpoint.build_request(attempts, span.headers)
                response = await send(request)
                try:
                    buffer = ResponseBuffer(response, attempts.remaining)
                    async for part in response.aiter_bytes():
                        buffer.add(part)
                finally:
                    await response.aclose()
                return span.answered(buffer.response())
        finally:
            seconds_left.reset(token)
            if pool is not None and self.closed:  # during the call, whose connection returned to the pool after that
                await pool.aclose()
        raise attempts.timed_out()

    async def aclose(self) -> None:
        """Close the connections that were made in this process. Running calls raise `ConnectionFailed`."""
        pool = self.take_pool()
        if pool is not None:
            await pool.aclose()

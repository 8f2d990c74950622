"""A request to an endpoint that is called without FastAPI, independent of the transport (ASGI or fast path)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from starlette.types import Receive

from batchnorm_service.tokens import Grant, Scope

from .bodies import ClientGoneError, read_body
from .disconnects import cancel_on_disconnect
from .headers import Headers
from .responses import Response

T = TypeVar("T")
Body = bytearray | memoryview
_LEAST = Grant(Scope.READ)


class LayerRequest:
    """A request to an endpoint of a layer, or of several layers.

    Attributes:
        name: the layer's name, already validated; empty for calls on several layers.
        query: the raw query string.
        headers: by lower-case name.
        received: the body, writable; None if it was not read yet. The fast path reads it before the endpoint runs.
        grant: what the caller may do.
        version: the version or tag that the path names, or None.
        request_id: of the response.
        waiting: entered while the call waits for a change; it does not count as running then.
        ends_on_disconnect: whether the call that runs now is of no use without its client (fast path).
        disconnected: whether the client has disconnected (fast path).
    """

    __slots__ = (
        *("_receive", "disconnected", "ends_on_disconnect", "grant", "headers", "name", "query", "received"),
        *("request_id", "version", "waiting"),
    )

    def __init__(
        self,
        name: str,
        query: bytes,
        headers: Headers,
        receive: Receive | None = None,
        received: Body | None = None,
        grant: Grant | None = None,
        version: str | None = None,
        request_id: str = "",
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.name = name
        self.query = query
        self.headers = headers
        self._receive = receive
        self.received = received
        self.grant = grant or _LEAST
        self.version = version
        self.request_id = request_id
        self.waiting = waiting
        self.ends_on_disconnect = self.disconnected = False

    async def body(self, limit: int) -> Body:
        """The whole body, writable. Raises the same as `read_body`."""
        if self.received is None:
            assert self._receive is not None  # noqa: S101 - a request has either `received` or `receive`
            self.received = await read_body(self.headers, self._receive, limit)
        return self.received

    async def cancel_on_disconnect(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of `call`, which is cancelled if the client disconnects.

        Raises:
            ClientGoneError: the client disconnected first.
        """
        if self._receive is not None:
            return await cancel_on_disconnect(self._receive, call)
        self.ends_on_disconnect = True
        try:
            return await call
        except asyncio.CancelledError:
            if self.disconnected:
                raise ClientGoneError from None
            raise
        finally:
            self.ends_on_disconnect = False


Endpoint = Callable[[LayerRequest], Coroutine[Any, Any, Response]]

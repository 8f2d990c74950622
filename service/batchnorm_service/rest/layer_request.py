"""A POST to a call of a layer, whatever brought it: ASGI, or the fast path, which has the body already."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from .bodies import read_body
from .disconnects import unless_gone
from .headers import Headers
from .responses import Response

T = TypeVar("T")
Body = bytearray | memoryview


class LayerRequest:
    """What an endpoint needs of such a request.

    Attributes:
        name: of the layer; it has been checked.
        query: the query string.
        headers: by their names in lower case.
        received: the body, writable, if it has come.
    """

    __slots__ = ("_receive", "headers", "name", "query", "received")

    def __init__(
        self, name: str, query: bytes, headers: Headers, receive: Receive | None = None, received: Body | None = None
    ) -> None:
        self.name = name
        self.query = query
        self.headers = headers
        self._receive = receive
        self.received = received

    async def body(self, limit: int) -> Body:
        """The whole body, writable. Raises as `read_body`."""
        if self.received is None:
            assert self._receive is not None  # noqa: S101 - a request has a body, or brings it
            self.received = await read_body(self.headers, self._receive, limit)
        return self.received

    async def unless_gone(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of a call that waits for other callers, unless its own caller goes away meanwhile."""
        return await (call if self._receive is None else unless_gone(self._receive, call))


Endpoint = Callable[[LayerRequest], Coroutine[Any, Any, Response]]

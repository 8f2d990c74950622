"""The fast path: calls the gateway's endpoints from the HTTP parser's callbacks, without ASGI.

ASGI needs a scope, a task, an event and four messages per request, about a sixth of the time of an eval of 8 KiB
(measured in `benchmarks/README.md`). Both use the same endpoints; `tests/fast_path/test_against_asgi.py` compares them.
"""

from __future__ import annotations

from asyncio import Task
from typing import Final, Self

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from batchnorm_client.wire.errors import Overloaded, ProblemError
from batchnorm_service.fast_path.eager import start
from batchnorm_service.fast_path.write_coalescing import CoalescingProtocol
from batchnorm_service.rest import (
    JOIN_BYTES,
    BodyBuffer,
    Gateway,
    Headers,
    LayerRequest,
    Response,
    Target,
    read_headers,
)
from batchnorm_service.telemetry import Span
from batchnorm_service.tokens import Grant

_EMPTY: Final = memoryview(b"")

_METHODS: Final = {b"GET": "GET", b"POST": "POST", b"PUT": "PUT"}

_UNSUPPORTED_HEADERS: Final = frozenset({b"expect", b"transfer-encoding", b"upgrade"})
"""Headers that the fast path does not implement: such requests take uvicorn's own cycle."""

_KEEP_ALIVE: Final = b"keep-alive"
"""A value of Connection that has no effect in HTTP/1.1, where it is the default (RFC 9112, 9.3)."""


class FastPathProtocol(CoalescingProtocol):
    """uvicorn HTTP protocol with a fast path to the endpoints of a `Gateway`."""

    _default_headers: object = None
    _default_head = b""

    def on_headers_complete(self) -> None:
        """A request's head has been read."""
        if (cycle := self._new_fast_cycle()) is not None:
            self.cycle = cycle  # type: ignore[assignment]
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a request's body has been read."""
        if (cycle := self._fast_cycle()) is not None:
            cycle.receive(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has been read."""
        if (cycle := self._fast_cycle()) is not None:
            cycle.start()
        else:
            super().on_message_complete()

    def default_head(self) -> bytes:
        """The encoded default headers of all responses, cached; uvicorn replaces their list once a second (Date)."""
        headers = self.server_state.default_headers
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_head = b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._default_head

    def on_refused_request_complete(self) -> None:
        """The rest of a request that was refused early has been read."""
        self._set_idle()

    def shutdown(self) -> None:
        """The server stops: calls that wait for a change end, and a partly received request goes to uvicorn's cycle."""
        if isinstance(self.app, Gateway):
            self.app.stop_waiting()
        if (cycle := self._fast_cycle()) is not None and cycle.reading:
            self.cycle = None  # type: ignore[assignment]
            super().on_headers_complete()
            super().on_body(cycle.abandon())
        super().shutdown()

    def _fast_cycle(self) -> FastPathCycle | None:
        cycle: object = self.cycle
        return cycle if isinstance(cycle, FastPathCycle) else None

    def _new_fast_cycle(self) -> FastPathCycle | None:
        method = _METHODS.get(self.parser.get_method(), "")
        if not isinstance(self.app, Gateway) or (found := self.app.fast_target(method, self.url)) is None:
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None  # pipelined: uvicorn keeps responses in order
        if self.flow.write_paused or not self.parser.should_keep_alive():
            return None
        headers = read_headers(self.headers)
        length = headers.get(b"content-length", b"0" if method == "GET" else b"")
        if not (length.isdigit() and len(length) <= 18 and self._is_plain(headers)):
            return None
        size, (target, query) = int(length), found
        grant = self.app.admit(method, target, headers, size)
        if grant is None:
            return None
        traces = self.app.reports.traces
        span = None if traces is None else traces.begin(headers, method)
        return FastPathCycle(self, self.app, method, target, query, headers, size, grant, span)

    def _is_plain(self, headers: Headers) -> bool:
        """Whether the headers need no special treatment by the server."""
        if not _UNSUPPORTED_HEADERS.isdisjoint(headers):
            return False
        connection = headers.get(b"connection")
        return connection is None or (connection.lower() == _KEEP_ALIVE and self.parser.get_http_version() == "1.1")


class FastPathCycle:
    """One request and its response, in place of uvicorn's `RequestResponseCycle`, with the attributes uvicorn uses."""

    __slots__ = (
        "_body",
        "_buffer",
        "_gateway",
        "_grant",
        "_headers",
        "_method",
        "_protocol",
        "_query",
        "_request",
        "_size",
        "_span",
        "_target",
        "_task",
        "disconnected",
        "keep_alive",
        "reading",
        "response_complete",
    )

    response_started = False

    def __init__(
        self,
        protocol: FastPathProtocol,
        gateway: Gateway,
        method: str,
        target: Target,
        query: bytes,
        headers: Headers,
        size: int,
        grant: Grant,
        span: Span | None,
    ) -> None:
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False
        self.reading = True
        self._protocol = protocol
        self._gateway = gateway
        self._method = method
        self._target = target
        self._query = query
        self._headers = headers
        self._size = size
        self._span = span
        self._grant = grant
        self._body = _EMPTY
        self._buffer: BodyBuffer | None = None
        self._request: LayerRequest | None = None
        self._task: Task[Response | None] | None = None

    def receive(self, piece: bytes) -> None:
        """Add a piece of the body. The parser never passes more than Content-Length bytes."""
        if len(piece) == self._size:
            self._body = memoryview(bytearray(piece))  # writable, so that tensors can be views on it
        elif self.reading:
            self._receive_part(piece)

    def start(self) -> None:
        """The body is complete: call the endpoint, and respond at once unless it suspends."""
        if not self.reading:
            self._protocol.on_refused_request_complete()
            return
        self.reading = False
        # The connection references this cycle until its next request: release the body now.
        body, self._body = self._body if self._buffer is None else self._take_body(), _EMPTY
        target = self._target
        request = LayerRequest(
            target.layer or "", self._query, self._headers, received=body, grant=self._grant, version=target.version
        )
        response = start(self._gateway.respond(self._method, target, request, self._span), self._protocol.loop)
        if isinstance(response, Response):
            self._send(response)
        elif response is not None:
            self._request, self._task = request, response
            self._protocol.tasks.add(response)  # type: ignore[arg-type] # a forced shutdown cancels it: responds 503
            response.add_done_callback(self._responded)

    def abandon(self) -> bytes:
        """Abandon the request; return the part of its body that was received."""
        self.reading = False
        return bytes(self._take_body())

    @property
    def message_event(self) -> Self:
        """The event that uvicorn sets when the client disconnects: this object's `set`."""
        return self

    def set(self) -> None:
        """The client disconnected: release the body. A call that has started continues, unless it only waits."""
        if self.reading:
            self.abandon()
            self._gateway.disconnected(self._method, self._target, self._headers, self._span)
        elif self._task is not None and self._request is not None:
            self._request.disconnected = True
            if self._request.ends_on_disconnect:
                self._task.cancel()

    def _receive_part(self, piece: bytes) -> None:
        if self._buffer is None:
            self._buffer = BodyBuffer(self._size)
        transfers = self._gateway.transfers
        try:
            transfers.receive(len(piece))
            try:
                self._buffer.add(piece)
            except Overloaded:
                transfers.release(len(piece))
                raise
        except Overloaded as problem:
            self._refuse(problem)

    def _take_body(self) -> memoryview:
        """Take the received part of the body, which then no longer counts as buffered."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return _EMPTY
        self._gateway.transfers.release(buffer.filled)
        return buffer.take()

    def _refuse(self, problem: ProblemError) -> None:
        """Respond before the body is complete; the rest of it is discarded."""
        self.reading = False
        self._take_body()
        self._send(self._gateway.refuse(self._method, problem, self._target, self._headers, self._span))

    def _responded(self, task: Task[Response | None]) -> None:
        self._protocol.tasks.discard(task)
        self._request = self._task = None
        if (response := task.result()) is not None:
            self._send(response)

    def _send(self, response: Response) -> None:
        protocol, transport = self._protocol, self._protocol.transport
        self.response_complete = True
        if self.disconnected or transport.is_closing():
            return
        head = [
            STATUS_LINE[response.status_code],
            protocol.default_head(),
            *[b"%b: %b\r\n" % header for header in response.raw_headers],
            b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
        ]
        if response.size <= JOIN_BYTES:
            transport.write(b"".join([*head, *response.pieces]))
        else:
            transport.writelines([b"".join(head), *response.pieces])
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

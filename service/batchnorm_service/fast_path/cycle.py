"""The fast path: requests to the gateway's endpoints go from the HTTP parser to their responses without ASGI.

ASGI costs an eval of 8 KiB about a sixth of its time (measured in `benchmarks/README.md`): a scope, a task, an event
and four messages for what is one function of the body. The endpoints are the same;
`tests/fast_path/test_against_asgi.py` compares the two.
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

_NOTHING: Final = memoryview(b"")

_NOT_FAST: Final = frozenset({b"expect", b"transfer-encoding", b"upgrade"})
"""Headers that ask the server for something; uvicorn's own cycle knows what."""

_KEEP_ALIVE: Final = b"keep-alive"
"""What many clients say of the connection, and what HTTP/1.1 does anyway (RFC 9112, 9.3)."""


class FastPathProtocol(CoalescingProtocol):
    """uvicorn's HTTP protocol, with a fast path to the endpoints of a `Gateway`."""

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
            cycle.fill(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has been read."""
        if (cycle := self._fast_cycle()) is not None:
            cycle.start()
        else:
            super().on_message_complete()

    def default_head(self) -> bytes:
        """The headers that every response has. uvicorn makes a new list of them once a second."""
        headers = self.server_state.default_headers
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_head = b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._default_head

    def was_read(self) -> None:
        """A request that was answered before has been read to its end."""
        self._becomes_idle()

    def shutdown(self) -> None:
        """The server stops. A client that is still sending its body is waited for and told, as uvicorn has it."""
        if (cycle := self._fast_cycle()) is not None and cycle.reading:
            self.cycle = None  # type: ignore[assignment]
            super().on_headers_complete()
            super().on_body(cycle.give_up())
        super().shutdown()

    def _fast_cycle(self) -> FastPathCycle | None:
        cycle: object = self.cycle
        return cycle if isinstance(cycle, FastPathCycle) else None

    def _new_fast_cycle(self) -> FastPathCycle | None:
        if not isinstance(self.app, Gateway) or (target := self.app.fast_target(self.url)) is None:
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None  # pipelined: uvicorn keeps the order
        if self.flow.write_paused or self.parser.get_method() != b"POST" or not self.parser.should_keep_alive():
            return None
        headers = read_headers(self.headers)
        length = headers.get(b"content-length", b"")
        if not (length.isdigit() and len(length) <= 18 and self._is_plain(headers)):
            return None
        size = int(length)
        if not self.app.admits(target, headers, size):
            return None
        return FastPathCycle(self, self.app, target, headers, size)

    def _is_plain(self, headers: Headers) -> bool:
        """Whether the head asks for nothing but an answer."""
        if not _NOT_FAST.isdisjoint(headers):
            return False
        connection = headers.get(b"connection")
        return connection is None or (connection.lower() == _KEEP_ALIVE and self.parser.get_http_version() == "1.1")


class FastPathCycle:
    """One request and its response, where uvicorn keeps its `RequestResponseCycle`, with what uvicorn sees of it."""

    __slots__ = (
        "_body",
        "_buffer",
        "_gateway",
        "_headers",
        "_protocol",
        "_size",
        "_target",
        "disconnected",
        "keep_alive",
        "reading",
        "response_complete",
    )

    response_started = False

    def __init__(
        self, protocol: FastPathProtocol, gateway: Gateway, target: Target, headers: Headers, size: int
    ) -> None:
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False
        self.reading = True
        self._protocol = protocol
        self._gateway = gateway
        self._target = target
        self._headers = headers
        self._size = size
        self._body = _NOTHING
        self._buffer: BodyBuffer | None = None

    def fill(self, piece: bytes) -> None:
        """Take a piece of the body. The parser gives no more than was announced."""
        if len(piece) == self._size:
            self._body = memoryview(bytearray(piece))  # decoding wants it writable
        elif self.reading:
            self._fill_in_part(piece)

    def start(self) -> None:
        """The body is complete: respond, at once if nothing has to be waited for."""
        if not self.reading:
            self._protocol.was_read()
            return
        self.reading = False
        # The connection keeps this cycle until its next request; it must not keep the body.
        body, self._body = self._body if self._buffer is None else self._take(), _NOTHING
        request = LayerRequest(self._target.layer or "", b"", self._headers, received=body)
        response = start(self._gateway.respond(self._target, request), self._protocol.loop)
        if isinstance(response, Response):
            self._send(response)
        else:
            self._protocol.tasks.add(response)  # type: ignore[arg-type] # to be cancelled by a forced stop, which tells the caller
            response.add_done_callback(self._responded)

    def give_up(self) -> bytes:
        """Let go of the request; what has come of its body."""
        self.reading = False
        return bytes(self._take())

    @property
    def message_event(self) -> Self:
        """What uvicorn sets when the client has gone."""
        return self

    def set(self) -> None:
        """The client has gone. Nobody waits for that; a call that has begun goes on."""
        if self.reading:
            self.give_up()

    def _fill_in_part(self, piece: bytes) -> None:
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

    def _take(self) -> memoryview:
        """What has come of the body, which is not on its way in any more."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return _NOTHING
        self._gateway.transfers.release(buffer.filled)
        return buffer.take()

    def _refuse(self, problem: ProblemError) -> None:
        """Respond before the body is complete. What else comes of it is dropped."""
        self.reading = False
        self._take()
        self._send(self._gateway.refuse(problem, self._target, self._headers))

    def _responded(self, task: Task[Response]) -> None:
        self._protocol.tasks.discard(task)
        self._send(task.result())

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

"""The direct way: train, eval, inverse and moments go from the HTTP parser to their answers without ASGI in between.

ASGI costs an eval of 8 KiB about a sixth of its time (measured in `benchmarks/README.md`): a scope, a task, an event
and four messages for what is one function of the body. What goes this way does what it would do on the other one;
`tests/service/test_direct.py` compares the two.
"""

from __future__ import annotations

from asyncio import Future, Task
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Self

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from batchnorm_client.wire.errors import Overloaded, ProblemError
from batchnorm_service.fast_path.write_coalescing import CoalescingProtocol
from batchnorm_service.rest import (
    JOIN_BYTES,
    BodyBuffer,
    Gateway,
    Headers,
    PendingResponse,
    Response,
    Target,
    read_headers,
)

_NOTHING: Final = memoryview(b"")

_NOT_DIRECT: Final = frozenset({b"expect", b"transfer-encoding", b"upgrade"})
"""Headers that ask the server for something; uvicorn's own cycle knows what."""

_KEEP_ALIVE: Final = b"keep-alive"
"""What many clients say of the connection, and what HTTP/1.1 does anyway (RFC 9112, 9.3)."""


class FastPathProtocol(CoalescingProtocol):
    """uvicorn's HTTP protocol, with a direct way for calls of a `Gateway`."""

    def on_headers_complete(self) -> None:
        """A request's head has been read."""
        if (cycle := self._new_direct_cycle()) is not None:
            self.cycle = cycle  # type: ignore[assignment]
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a request's body has been read."""
        if (cycle := self._direct_cycle()) is not None:
            cycle.fill(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has been read."""
        if (cycle := self._direct_cycle()) is not None:
            cycle.start()
        else:
            super().on_message_complete()

    def was_read(self) -> None:
        """A request that was answered before has been read to its end."""
        self._becomes_idle()

    def shutdown(self) -> None:
        """The server stops. A client that is still sending its body is waited for and told, as uvicorn has it."""
        if (cycle := self._direct_cycle()) is not None and cycle.reading:
            self.cycle = None  # type: ignore[assignment]
            super().on_headers_complete()
            super().on_body(cycle.give_up())
        super().shutdown()

    def _direct_cycle(self) -> FastPathCycle | None:
        cycle: object = self.cycle
        return cycle if isinstance(cycle, FastPathCycle) else None

    def _new_direct_cycle(self) -> FastPathCycle | None:
        if not isinstance(self.app, Gateway) or (target := self.app.direct_target(self.url)) is None:
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
        if not _NOT_DIRECT.isdisjoint(headers):
            return False
        connection = headers.get(b"connection")
        return connection is None or (connection.lower() == _KEEP_ALIVE and self.parser.get_http_version() == "1.1")


class FastPathCycle:
    """One request and its answer. It stands where uvicorn keeps its `RequestResponseCycle`, with what uvicorn sees."""

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
        """The body is complete: answer, at once if that is possible."""
        if not self.reading:
            self._protocol.was_read()
            return
        self.reading = False
        # The connection keeps this cycle until its next request; it must not keep the body.
        body, self._body = self._body if self._buffer is None else self._take(), _NOTHING
        gateway = self._gateway
        if gateway.enter():
            answer = gateway.answer_now(self._target, self._headers, body)
        else:
            answer = gateway.refuse(None, self._target, self._headers)
        if answer is not None:
            gateway.leave()
            self._send(answer)
            return
        pending = gateway.answer_soon(self._target, self._headers, body)
        if pending is None:
            self._answer_later(lambda: gateway.answer(self._target, self._headers, body))
            return
        if isinstance(pending, Response):
            gateway.leave()
            self._send(pending)
            return
        self._protocol.tasks.add(pending.folded)  # type: ignore[arg-type] # to be cancelled by a forced stop
        pending.folded.add_done_callback(partial(self._folded, pending))

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
        """Response before the body is complete. What else comes of it is dropped."""
        self.reading = False
        self._take()
        self._send(self._gateway.refuse(problem, self._target, self._headers))

    def _folded(self, pending: PendingResponse, future: Future[Any]) -> None:
        self._protocol.tasks.discard(future)
        answer = pending.now()
        if answer is None:
            self._answer_later(pending.later)
        else:
            self._gateway.leave()
            self._send(answer)

    def _answer_later(self, coming: Callable[[], Awaitable[Response]]) -> None:
        async def answer() -> None:
            answer = await coming()
            self._gateway.leave()
            self._send(answer)

        task = self._protocol.loop.create_task(answer())
        self._protocol.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: Task[None]) -> None:
        self._protocol.tasks.discard(task)
        if task.cancelled():  # before it began: the server stops at once
            self._gateway.leave()

    def _send(self, answer: Response) -> None:
        protocol, transport = self._protocol, self._protocol.transport
        self.response_complete = True
        if self.disconnected or transport.is_closing():
            return
        head = [
            STATUS_LINE[answer.status_code],
            *[b"%b: %b\r\n" % header for header in protocol.server_state.default_headers],
            *[b"%b: %b\r\n" % header for header in answer.raw_headers],
            b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
        ]
        if answer.size <= JOIN_BYTES:
            transport.write(b"".join([*head, *answer.pieces]))
        else:
            transport.writelines([b"".join(head), *answer.pieces])
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

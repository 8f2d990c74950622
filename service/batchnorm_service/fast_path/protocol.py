"""HTTP before it is a request: what cannot be parsed, or has no end, is answered as a problem like everything else."""

from __future__ import annotations

import uuid
from array import array
from http import HTTPStatus
from typing import Any, Final

from httptools import HttpParserUpgrade, HttpRequestParser

from batchnorm_client.wire.errors import MalformedBody, PayloadTooLarge, ProblemError, RequestTimeout
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_service.fast_path.cycle import FastPathProtocol
from batchnorm_service.fast_path.trailers import MOST_HEAD_BYTES, HeadTooLargeError
from batchnorm_service.rest.problems import respond_problem

LINGER_SECONDS: Final = 1.0


class _Parser(HttpRequestParser):
    """httptools' parser, which keeps where it stopped because of an offer to upgrade, instead of raising that."""

    stopped_at: int | None = None

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        """Parse this."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as stop:
            self.stopped_at = stop.args[0]


class Protocol(FastPathProtocol):
    """uvicorn's HTTP protocol, with a bound on request heads, and problems where it has plain text.

    An offer to go on in another protocol (`Upgrade`) is ignored, as RFC 9110, 7.8 allows. Java's client and
    `curl --http2` offer HTTP/2 with every first request, and httptools does not read its body then. So such a head is
    parsed a second time, without the offer.
    """

    parser: _Parser
    _in_head = False
    _refused = False
    _offered = False
    _ended = False
    _may_be_long = False
    """A whole head may be too large: it has not come in parts, which are counted."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._new_parser()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._refused:
            return
        self._ended = False
        self._may_be_long = len(data) > MOST_HEAD_BYTES
        super().data_received(data)
        rest = memoryview(data)
        while self._offered and (end := self.parser.stopped_at) is not None:
            rest = rest[end:]
            self._read_without_offer(rest)
        if self._receiving and not self._refused:
            self._received_in_part(len(rest))

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_bytes, self._received = True, 0, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The request's head has been read."""
        # CONNECT counts as an upgrade by itself, with nothing to leave out. uvicorn refuses it.
        self._offered = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._may_be_long and self._size_of_head() > MOST_HEAD_BYTES:
            self._head_bytes = MOST_HEAD_BYTES + 1
            raise HeadTooLargeError
        if not self._offered:
            super().on_headers_complete()
        self._in_head = False

    def on_message_complete(self) -> None:
        """The request's body has been read; that of a request with an offer has not, whatever the parser says."""
        if not self._offered:
            self._ended, self._receiving = True, False
            super().on_message_complete()

    def _read_without_offer(self, rest: memoryview) -> None:
        self._offered = False
        head = self._head_without_offer()
        self._new_parser()  # the old one may be in its last state, after `Connection: close`
        super().data_received(head)
        if not self._refused:
            super().data_received(rest)  # type: ignore[arg-type] # a parser takes any buffer

    def _new_parser(self) -> None:
        self.parser = _Parser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    def _size_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _head_without_offer(self) -> bytes:
        line = b" ".join([self.parser.get_method(), self.url, b"HTTP/" + self.parser.get_http_version().encode()])
        kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *kept, b"", b""])

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP."""
        if self._head_bytes > MOST_HEAD_BYTES:
            self._refuse(_too_large())
        else:
            self._refuse(MalformedBody(f"this is no HTTP request: {msg}"))

    def request_is_late(self) -> None:
        """A request comes too slowly."""
        seconds = self.transfers.read_timeout
        self._refuse(
            RequestTimeout(f"nothing of the request came for {seconds:g} s, or less than 1 KiB/s on average since then")
        )

    def _received_in_part(self, size: int) -> None:
        super()._received_in_part(size)
        if self._in_head and not self._ended:  # a piece that another request ends in is not the head's alone
            self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            self._refuse(_too_large())

    def _refuse(self, problem: ProblemError) -> None:
        """Read no more; answer with this problem once everything before is answered, and close."""
        if self._refused:
            return
        self._refused, self._incoming = True, None
        farewell = _farewell(problem)
        cycle = self.cycle
        waits = cycle is not None and not cycle.response_complete
        if self._receiving and not self._in_head:  # the request that is refused has a cycle, the newest
            waits = bool(self.pipeline) and self.pipeline[0][0] is cycle
            if waits:
                self.pipeline.popleft()
            elif cycle.response_complete or cycle.response_started:
                farewell = b""  # such as 401: it cannot be answered twice
            cycle.disconnected = True
            cycle.message_event.set()
        if waits:
            self.pipeline.appendleft((_Farewell(self, farewell), self.app))  # type: ignore[arg-type]
        else:
            self.say_farewell(farewell)

    def say_farewell(self, farewell: bytes) -> None:
        """Send these last bytes, and close."""
        if self.transport.is_closing():
            return
        if farewell:
            self.transport.write(farewell)
        # Closing with unread bytes would reset the connection, and the client might never see the answer.
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class _Farewell:
    """A refusal that waits in uvicorn's pipeline for the requests before it, in place of a request's cycle."""

    def __init__(self, protocol: Protocol, farewell: bytes) -> None:
        self._protocol = protocol
        self._farewell = farewell

    async def run_asgi(self, _app: object) -> None:
        """What uvicorn calls when all before is answered."""
        self._protocol.say_farewell(self._farewell)


def _farewell(problem: ProblemError) -> bytes:
    answer = respond_problem(problem, "/", request_id := uuid.uuid4().hex)
    headers = [*answer.raw_headers, (REQUEST_ID.lower().encode(), request_id.encode()), (b"connection", b"close")]
    head = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n".encode()
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return b"".join([head, lines, b"\r\n", *answer.pieces])


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"the request's headers and trailers are larger than {MOST_HEAD_BYTES} bytes")

"""The server's HTTP protocol class: limits on request heads, and problem documents for requests it cannot parse."""

from __future__ import annotations

import uuid
from array import array
from asyncio import Transport
from http import HTTPStatus
from typing import Any, Final

from httptools import HttpParserUpgrade, HttpRequestParser

from batchnorm_client.wire.errors import MalformedBody, PayloadTooLarge, ProblemError, RequestTimeout
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_service.fast_path.cycle import FastPathProtocol
from batchnorm_service.rest import Connections, Gateway, RequestLimits
from batchnorm_service.rest.problems import respond_problem
from batchnorm_service.rest.reports import Served
from batchnorm_service.telemetry.metrics import OTHER

LINGER_SECONDS: Final = 1.0


class _Parser(HttpRequestParser):
    """httptools parser that stores where it stopped at an Upgrade header, instead of raising an exception."""

    stopped_at: int | None = None

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        """Parse data."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as stop:
            self.stopped_at = stop.args[0]


class Protocol(FastPathProtocol):
    """uvicorn HTTP protocol with a size limit on request heads, and problem documents instead of plain text.

    `Upgrade` headers are ignored, as RFC 9110, 7.8 allows. Java's client and `curl --http2` send one with their first
    request (for HTTP/2), and httptools then does not parse the body. So such a head is parsed again without it.
    """

    parser: _Parser
    url = b""
    _in_head = False
    _refused = False
    _upgrade_offered = False
    _ended = False
    _measure_head = False
    """Whether a head that is complete may be too large: it came in several pieces, or in one that is."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        app = self.app
        self._limits, self._pool = (
            (app.limits, app.connections) if isinstance(app, Gateway) else (RequestLimits(), Connections())
        )
        self._new_parser()

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        refusal = self._pool.add(self, self.loop.time())
        if refusal is not None:
            if self._pool.many_refused:
                self.transport.abort()
            else:
                self._refuse(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self._pool.remove(self)

    def data_received(self, data: bytes) -> None:
        """Data was received from the client."""
        if self._refused:
            return
        self._ended, self._body_bytes = False, 0
        after_head = self._receiving and not self._in_head
        self._measure_head = self._in_head or len(data) > self._limits.header_bytes
        super().data_received(data)
        rest = memoryview(data)
        while self._upgrade_offered and (end := self.parser.stopped_at) is not None:
            rest = rest[end:]
            self._reparse_without_upgrade(rest)
        if self._receiving and not self._refused:
            if after_head and not (self._ended or self._in_trailers or self._fast_cycle()):  # which takes no chunks
                self.count_framing(len(data))
            self._received_in_part(len(rest))

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_bytes, self._head_fields, self._received = True, 0, 0, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The request's head has been read."""
        # The parser treats CONNECT as an upgrade too; it has no header to remove, and uvicorn refuses it.
        self._upgrade_offered = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        self._head_fields = len(self.headers)
        if self._measure_head:
            self._head_bytes = self._head_size()
        self.check_head()
        if not self._upgrade_offered:
            super().on_headers_complete()
        self._in_head = False

    def on_message_complete(self) -> None:
        """The request's body has been read, unless the parser stopped at an upgrade."""
        if not self._upgrade_offered:
            self._ended, self._receiving = True, False
            super().on_message_complete()

    def _reparse_without_upgrade(self, rest: memoryview) -> None:
        self._upgrade_offered = False
        head = self._head_without_upgrade()
        self._new_parser()  # the old one may have ended, after `Connection: close`
        super().data_received(head)
        if not self._refused:
            super().data_received(rest)  # type: ignore[arg-type] # a parser takes any buffer

    def _new_parser(self) -> None:
        self.parser = _Parser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _head_without_upgrade(self) -> bytes:
        line = b" ".join([self.parser.get_method(), self.url, b"HTTP/" + self.parser.get_http_version().encode()])
        kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *kept, b"", b""])

    def send_400_response(self, msg: str) -> None:
        """The data cannot be parsed as HTTP, or a callback of the parser has refused the request."""
        try:
            self.check_head()
        except PayloadTooLarge as problem:
            self._refuse(problem)
        else:
            self._refuse(MalformedBody(f"this is no HTTP request: {msg}"))

    def check_head(self) -> None:
        """See `TrailerProtocol`."""
        self._limits.check(len(self.url), self._head_fields, self._head_bytes)

    def on_request_timeout(self) -> None:
        """See `DeadlineProtocol`."""
        seconds = self.transfers.read_timeout
        self._refuse(
            RequestTimeout(f"nothing of the request came for {seconds:g} s, or less than 1 KiB/s on average since then")
        )

    def _received_in_part(self, size: int) -> None:
        super()._received_in_part(size)
        if self._in_head and not self._ended:  # otherwise some of the data belongs to the request before
            self._head_bytes += size
        try:
            self.check_head()
        except PayloadTooLarge as problem:
            self._refuse(problem)

    def _refuse(self, problem: ProblemError) -> None:
        """Stop reading; respond with this problem after the responses to earlier requests, and close."""
        if self._refused:
            return
        self._refused, self._incoming = True, None
        if self._in_head:
            self.headers.clear()  # there may be thousands, and the connection is not closed at once
        request_id = uuid.uuid4().hex
        data = _refusal_bytes(problem, "/v2" if self.url.startswith(b"/v2/") else "/", request_id)
        if isinstance(self.app, Gateway):
            self.app.reports.report(Served(OTHER, None, {}, request_id, problem.status, problem.name, 0.0, 0, 0))
        cycle = self.cycle
        waits = cycle is not None and not cycle.response_complete
        if self._receiving and not self._in_head:  # the refused request has a cycle, which is the newest
            waits = bool(self.pipeline) and self.pipeline[0][0] is cycle
            if waits:
                self.pipeline.popleft()
            elif cycle.response_complete or cycle.response_started:
                data = b""  # it has a response already, such as 401
            cycle.disconnected = True
            cycle.message_event.set()
        if waits:
            self.pipeline.appendleft((_QueuedRefusal(self, data), self.app))  # type: ignore[arg-type]
        else:
            self.send_and_close(data)

    def send_and_close(self, data: bytes) -> None:
        """Send the last response of the connection, and close it."""
        if self.transport.is_closing():
            return
        if data:
            self.transport.write(data)
        # Lingering close: closing with unread data resets the connection, and the client may lose the response.
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class _QueuedRefusal:
    """Entry in uvicorn's pipeline that sends a refusal after the responses to earlier requests."""

    def __init__(self, protocol: Protocol, data: bytes) -> None:
        self._protocol = protocol
        self._data = data

    async def run_asgi(self, _app: object) -> None:
        """Called by uvicorn when the earlier responses are complete."""
        self._protocol.send_and_close(self._data)


def _refusal_bytes(problem: ProblemError, path: str, request_id: str) -> bytes:
    response = respond_problem(problem, path, request_id)
    headers = [*response.raw_headers, (REQUEST_ID.lower().encode(), request_id.encode()), (b"connection", b"close")]
    head = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n".encode()
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return b"".join([head, lines, b"\r\n", *response.pieces])

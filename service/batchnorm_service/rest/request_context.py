"""One ASGI request and its response: what every response has, and what is reported of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.types import Message, Send

from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_service.telemetry import Span
from batchnorm_service.telemetry.metrics import STATUS_CLASSES

from .accounting import RequestAccounting
from .headers import Headers, request_id
from .problems import ErrorPage, respond_problem
from .reports import RequestReports, Served
from .responses import RawHeader, Response
from .target import Target

_REQUEST_ID: Final = REQUEST_ID.lower().encode()
_CLOSE: Final = (b"connection", b"close")


class RequestContext:
    """Request id, status and span of one ASGI request; adds the headers that every response has.

    Set `close` to close the connection after the response.
    """

    def __init__(
        self,
        reports: RequestReports,
        method: str,
        target: Target,
        headers: Headers,
        accounting: RequestAccounting,
        span: Span | None,
        pages: Sequence[ErrorPage] = (),
    ) -> None:
        self._pages = pages
        self.request_id = request_id(headers)
        self.status = 0
        self.close = False
        self._reports = reports
        self._method = method
        self._target = target
        self._headers = headers
        self._accounting = accounting
        self._span = span
        self._expects = b"expect" in headers

    async def send_response(self, response: Response, send: Send) -> None:
        """Send a response with the headers that every response has."""
        self._complete(response.status_code, response.raw_headers, response.outcome)
        await response({}, _no_receive, send)

    def completing(self, send: Send, state: Mapping[str, Any]) -> Send:
        """An ASGI `send` that adds them to the responses of the wrapped application, whose `request.state` this is."""

        async def complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = list(message["headers"])
                outcome = state.get("outcome") or STATUS_CLASSES[message["status"] // 100]
                self._complete(message["status"], message["headers"], outcome)
            await send(message)

        return complete

    async def fail(self, error: Exception, send: Send) -> None:
        """Respond with a problem document, unless a response has started."""
        if self.status == 0:
            path, pages = self._target.path, self._pages
            await self.send_response(respond_problem(error, path, self.request_id, self._headers, pages), send)

    def report(self, outcome: str, sent: int) -> None:
        """Report the response that is about to be sent, or that its client has disconnected."""
        accounting = self._accounting
        seconds = time.perf_counter() - accounting.call.began
        span, self._span = self._span, None
        self._reports.report(
            Served(
                self._method,
                self._target,
                self._headers,
                self.request_id,
                self.status,
                outcome,
                seconds,
                accounting.received,
                sent,
            ),
            span,
        )

    def _complete(self, status: int, headers: list[RawHeader], outcome: str) -> None:
        self.status = status
        self.report(outcome, int(dict(headers).get(b"content-length", 0)))
        headers.append((_REQUEST_ID, self.request_id.encode()))
        if self.close:
            headers.append(_CLOSE)
        elif self._expects and status >= 400:
            # A client that waits for 100 Continue may now omit the body or send it: what follows on this connection
            # could be either that body or the next request.
            headers.append(_CLOSE)


async def _no_receive() -> Message:
    raise RuntimeError("a response does not read the request")

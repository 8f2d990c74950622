"""HTTP before it is a request: what cannot be parsed, or has no end, is answered as a problem like everything else."""

from __future__ import annotations

import uuid
from http import HTTPStatus
from typing import Final

from batchnorm_client.contract import REQUEST_ID
from batchnorm_client.errors import MalformedBody, PayloadTooLarge, ProblemError
from batchnorm_service.api.problems import problem_answer
from batchnorm_service.direct import DirectProtocol

MOST_HEAD_BYTES: Final = 1 << 16
"""A request line with its headers; what is read of one that has not ended yet is kept in memory."""


LINGER_SECONDS: Final = 1.0


class Protocol(DirectProtocol):
    """uvicorn's HTTP protocol, with a bound on request heads, and problems where it has plain text."""

    _in_head = False
    _head_bytes = 0
    _refused = False

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._refused:
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(PayloadTooLarge(f"the request's headers are larger than {MOST_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The request's head has been read."""
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP."""
        self._refuse(MalformedBody(f"this is no HTTP request: {msg}"))

    def _refuse(self, problem: ProblemError) -> None:
        self._in_head, self._refused = False, True
        answer = problem_answer(problem, "/", request_id := uuid.uuid4().hex)
        headers = [*answer.raw_headers, (REQUEST_ID.lower().encode(), request_id.encode()), (b"connection", b"close")]
        head = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n".encode()
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(b"".join([head, lines, b"\r\n", *answer.pieces]))
        # Closing with unread bytes would reset the connection, and the client might never see the answer.
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

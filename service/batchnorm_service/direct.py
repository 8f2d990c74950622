"""The direct way: a small train or eval goes from the HTTP parser to its answer without ASGI in between.

ASGI costs an eval of 8 KiB a third of its time (measured in `benchmarks/README.md`): a scope, a task, an event and four
messages for what is one function of the body. What goes this way does what it would do on the other one;
`tests/service/test_direct.py` compares the two.
"""

from __future__ import annotations

from typing import Final

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from batchnorm_service.api import Answer, Headers, Shell, Target, read_headers
from batchnorm_service.outbox import OutboxProtocol

MOST_BYTES: Final = 1 << 16
"""Larger bodies take the ordinary way, where they are read chunk by chunk while the client is held back."""

_NOT_DIRECT: Final = frozenset({b"connection", b"expect", b"transfer-encoding", b"upgrade"})
"""Headers that ask the server for something; uvicorn's own cycle knows what."""


class DirectProtocol(OutboxProtocol):
    """uvicorn's HTTP protocol, with a direct way for small calls of a `Shell`."""

    def on_headers_complete(self) -> None:
        """A request's head has been read."""
        if (cycle := self._direct_cycle()) is not None:
            self.cycle = cycle  # type: ignore[assignment]
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request's body has been read."""
        super().on_message_complete()
        if (cycle := self._in_direct_cycle()) is not None:
            cycle.start()

    def shutdown(self) -> None:
        """The server stops. A client that is still sending its body is waited for and told, as uvicorn has it."""
        cycle = self._in_direct_cycle()
        if cycle is not None and cycle.more_body:
            self.cycle = None  # type: ignore[assignment]
            super().on_headers_complete()
            super().on_body(bytes(cycle.body))
        super().shutdown()

    def _in_direct_cycle(self) -> DirectCycle | None:
        cycle: object = self.cycle
        return cycle if isinstance(cycle, DirectCycle) else None

    def _direct_cycle(self) -> DirectCycle | None:
        if not isinstance(self.app, Shell) or (target := self.app.direct_target(self.url)) is None:
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None  # pipelined: uvicorn keeps the order
        if self.flow.write_paused or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        headers = read_headers(self.headers)
        size = headers.get(b"content-length", b"")
        if not (size.isdigit() and len(size) <= 5 and int(size) <= MOST_BYTES) or not _NOT_DIRECT.isdisjoint(headers):
            return None
        return DirectCycle(self, self.app, target, headers)


class _NobodyWaits:
    """What uvicorn wakes when something came or the client went. On the direct way nobody waits for that."""

    def set(self) -> None:
        """Wake nobody."""


class DirectCycle:
    """One request and its answer. It stands where uvicorn keeps its `RequestResponseCycle`, with what uvicorn sees."""

    __slots__ = (
        "_headers",
        "_protocol",
        "_shell",
        "_target",
        "body",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
    )

    message_event: Final = _NobodyWaits()

    def __init__(self, protocol: DirectProtocol, shell: Shell, target: Target, headers: Headers) -> None:
        self.body = bytearray()
        self.more_body = True
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False
        self._protocol = protocol
        self._shell = shell
        self._target = target
        self._headers = headers

    def start(self) -> None:
        """Answer, at once if that is possible."""
        answer = self._shell.answer_now(self._target, self._headers, self.body)
        if answer is not None:
            self._send(answer)
            return
        task = self._protocol.loop.create_task(self._answer_later())
        self._protocol.tasks.add(task)
        task.add_done_callback(self._protocol.tasks.discard)

    async def _answer_later(self) -> None:
        self._send(await self._shell.answer(self._target, self._headers, self._receive))

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": self.body, "more_body": False}

    def _send(self, answer: Answer) -> None:
        protocol, transport = self._protocol, self._protocol.transport
        self.response_complete = True
        if self.disconnected or transport.is_closing():
            return
        lines = [STATUS_LINE[answer.status_code]]
        for name, value in (*protocol.server_state.default_headers, *answer.raw_headers):
            lines += name, b": ", value, b"\r\n"
        lines.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        transport.write(b"".join([*lines, *answer.pieces]))
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

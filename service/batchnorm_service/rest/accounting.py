"""What one ASGI request counts for: running calls, and bytes that are buffered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Send

from batchnorm_client.wire.errors import Overloaded

from .responses import JOIN_BYTES
from .shares import REFUSAL_COST, CallShares, call_cost
from .target import Target
from .transfers import Transfers


class RequestAccounting:
    """Wrapper of one request's ASGI `receive` and `send` that counts running calls and buffered bytes.

    The call counts as running from the end of the body to the start of the response. Before that, the received part of
    the body counts as buffered; afterwards, the unsent part of the response.

    Attributes:
        began: when the call started to run, or the request to arrive, by `time.perf_counter`.
        received: bytes of the body.
    """

    __slots__ = (
        *("_buffered", "_counted", "_layer", "_receive", "_running", "_send", "_shares", "_transfers"),
        *("began", "received"),
    )

    def __init__(self, shares: CallShares, transfers: Transfers, receive: Receive, send: Send, target: Target) -> None:
        self._shares = shares
        self._transfers = transfers
        self._receive = receive
        self._send = send
        self._counted = target.versioned
        self._layer = target.layer
        self._running = False
        self._buffered = 0
        self.began = time.perf_counter()
        self.received = 0

    async def enter(self, *, waits: bool = False) -> None:
        """The request was read completely: its call starts to run, at once or when it is its layer's turn.

        A call that may wait for a change (`waits`) runs only from its turn on: thousands ask at once after each change,
        and must not be refused because of each other.

        Until then its body counts as buffered. Buffered bytes are checked once more, because a request may have been
        admitted before: responses that nobody reads would have no limit otherwise.

        Raises:
            Overloaded: too many calls are running.
        """
        self.began = time.perf_counter()
        if self._counted and not self._running:
            shares = self._shares
            refusal = None if waits else self._count()
            cost = call_cost(self.received) if refusal is None else REFUSAL_COST
            if not shares.may_start(self._layer, cost):
                await shares.turn(self._layer, cost)
            if waits:
                refusal = self._count()
            if refusal is not None:
                raise refusal
            self._release(self._buffered)
            self._transfers.check()

    async def receive(self) -> Message:
        """The next message of the request. After the last of its body, the call runs: see `enter`."""
        message = await self._receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.received += size
            if message.get("more_body", False):
                self._transfers.receive(size)
                self._buffered += size
            else:
                await self.enter()
                self._release(self._buffered)
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the response, with whose first the call no longer runs."""
        if message["type"] == "http.response.start":
            self.close()
            size = int(dict(message["headers"]).get(b"content-length", 0))
            if size > JOIN_BYTES:  # sent in pieces, each of which waits for the client to read the one before
                self._buffered += size
                self._transfers.hold(size)
        await self._send(message)
        if message["type"] == "http.response.body":
            self._release(min(self._buffered, len(message["body"])))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the call waits for a change, it does not count as running, and the time is not reported as its own."""
        self.close()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def close(self) -> None:
        """Undo what is still counted. May be called several times."""
        self._release(self._buffered)
        if self._running:
            self._running, self._counted = False, False
            self._shares.leave(self._layer)

    def _count(self) -> Overloaded | None:
        refusal = self._shares.enter(self._layer)
        self._running = refusal is None
        return refusal

    def _release(self, size: int) -> None:
        self._buffered -= size
        self._transfers.release(size)

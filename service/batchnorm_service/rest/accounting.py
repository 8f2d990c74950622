"""What one ASGI request counts for: running calls, and bytes that are buffered."""

from __future__ import annotations

import time

from starlette.types import Message, Receive, Send

from .responses import JOIN_BYTES
from .running_call import RunningCall
from .shares import CallShares, call_cost
from .target import Target
from .transfers import Transfers


class RequestAccounting:
    """Wrapper of one request's ASGI `receive` and `send` that counts running calls and buffered bytes.

    The call counts as running from the end of the body to the start of the response. Before that, the received part of
    the body counts as buffered; afterwards, the unsent part of the response.

    Attributes:
        call: that the request is for.
        received: bytes of the body.
    """

    __slots__ = ("_buffered", "_receive", "_send", "_started", "_transfers", "call", "received")

    def __init__(self, shares: CallShares, transfers: Transfers, receive: Receive, send: Send, target: Target) -> None:
        self._transfers = transfers
        self._receive = receive
        self._send = send
        self._started = not target.versioned
        self._buffered = 0
        self.call = RunningCall(shares, target.layer, counted=target.versioned)
        self.received = 0

    async def enter(self, *, waits: bool = False) -> None:
        """The request was read completely: its call starts to run, at once or when it is its layer's turn.

        Until then its body counts as buffered. Buffered bytes are checked once more, because a request may have been
        admitted before: responses that nobody reads would have no limit otherwise.

        Raises:
            Overloaded: too many calls are running.
        """
        self.call.began = time.perf_counter()
        if not self._started:
            self._started = True
            if not waits:
                self.call.enter()
            await self.call.start(call_cost(self.received), waits=waits)
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

    def close(self) -> None:
        """Undo what is still counted. May be called several times."""
        self._release(self._buffered)
        self.call.leave()

    def _release(self, size: int) -> None:
        self._buffered -= size
        self._transfers.release(size)

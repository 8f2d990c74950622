"""Connections on which nobody asks anything any more: one timer each, where uvicorn sets and clears one per request."""

from __future__ import annotations

import math
from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class IdleProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which notes when a connection became idle and looks after that now and then.

    Setting and clearing one per request is work that a small call notices in a profile, if hardly in its rate.
    """

    _receiving = False
    """The first bytes of a request have come, and it has not come whole yet."""

    _idle_since = math.inf
    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client has connected, and may never say anything."""
        super().connection_made(transport)
        self._becomes_idle()

    def on_message_begin(self) -> None:
        """A request begins, perhaps in the bytes that the one before it came in."""
        self._receiving = True
        self._idle_since = math.inf
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """A request has been read; it may have been answered before, such as with 401."""
        super().on_message_complete()
        if self.cycle.response_complete:
            self._becomes_idle()

    def on_response_complete(self) -> None:
        """An answer is written."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()  # sets no timer then
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        if not self._receiving:
            self._becomes_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _becomes_idle(self) -> None:
        self._idle_since = self.loop.time()
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._idle_since == math.inf:
            return  # a request is being read or answered, and the end of that sets a timer
        if self.flow.write_paused:
            self._becomes_idle()  # the last response is still on its way
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._timer = self.loop.call_later(left, self._look)

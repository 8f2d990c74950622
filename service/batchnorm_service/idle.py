"""Connections on which nobody asks anything any more: one timer each, where uvicorn sets and clears one per request."""

from __future__ import annotations

import math
from asyncio import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class IdleProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which notes when a connection became idle and looks after that now and then.

    Setting and clearing one per request is work that a small call notices in a profile, if hardly in its rate.
    """

    _idle_since = math.inf
    _timer: TimerHandle | None = None

    def on_message_begin(self) -> None:
        """A request begins, perhaps in the bytes that the one before it came in."""
        self._idle_since = math.inf
        super().on_message_begin()

    def on_response_complete(self) -> None:
        """An answer is written."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()  # sets no timer then
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._idle_since == math.inf:
            return  # a request is being answered, and the end of that sets a timer
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._timer = self.loop.call_later(left, self._look)

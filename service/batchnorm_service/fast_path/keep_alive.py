"""Keep-alive timeout of idle connections, with one timer per connection instead of uvicorn's one per request."""

from __future__ import annotations

import math
from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class IdleProtocol(HttpToolsProtocol):
    """uvicorn HTTP protocol that records when a connection became idle, and checks it with a recurring timer.

    Setting and cancelling a timer per request shows up in profiles of small calls.
    """

    _receiving = False
    """Whether a request was received in part."""

    _idle_since = math.inf
    _idle_timer: TimerHandle | None = None

    @property
    def idle_since(self) -> float:
        """When it became idle; infinite while a request is in progress, or a response is being sent."""
        return math.inf if self.flow.write_paused else self._idle_since

    def close_idle(self) -> None:
        """Close the connection, which is idle."""
        self.timeout_keep_alive_handler()

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client has connected; it may never send a request."""
        super().connection_made(transport)
        self._set_idle()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._receiving = True
        self._idle_since = math.inf
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """A request has been read. Its response may be complete already, such as 401."""
        super().on_message_complete()
        if self.cycle.response_complete:
            self._set_idle()

    def on_response_complete(self) -> None:
        """A response has been written."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()  # in these cases it sets no timer
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        if not self._receiving:
            self._set_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _set_idle(self) -> None:
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._check_idle)

    def _check_idle(self) -> None:
        self._idle_timer = None
        if self._idle_since == math.inf:
            return  # a request is in progress; its end sets a timer
        if self.flow.write_paused:
            self._set_idle()  # the last response is still being sent
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._idle_timer = self.loop.call_later(left, self._check_idle)

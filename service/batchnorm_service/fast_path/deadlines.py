"""Timeouts for receiving requests and sending responses, with one timer per connection for both.

The timer runs only while a request is incomplete or a response is unsent, so small calls never start it. Elapsed time
is summed from check to check. Delays caused by the server do not count: checks that are late because the event loop was
busy, and times when reading was paused.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from asyncio import TimerHandle, Transport
from typing import Any, Final

from batchnorm_service.fast_path.keep_alive import IdleProtocol
from batchnorm_service.rest import Gateway, Transfers

MIN_BYTES_PER_SECOND: Final = 1024
"""Minimum average rate of a request or response, checked once it has taken as long as its timeout."""

_CHECKS_PER_TIMEOUT: Final = 8
_MAX_INTERVAL: Final = 1.0


class TransferProgress:
    """Detector of slow transfers, from periodic readings of a byte counter.

    Args:
        timeout: seconds without a byte after which a transfer is too slow, and after which its average rate is checked.
        start: the counter's value before the transfer.
    """

    __slots__ = ("_elapsed", "_last", "_quiet", "_start", "_timeout")

    def __init__(self, timeout: float, start: int = 0) -> None:
        self._timeout = timeout
        self._start = start
        self._last: int | None = None
        self._elapsed = 0.0
        self._quiet = 0.0

    def is_too_slow(self, count: int, seconds: float) -> bool:
        """Check the counter, `seconds` after the previous check. The first check only starts the clock."""
        if self._last is not None:
            self._elapsed += seconds
            self._quiet = self._quiet + seconds if count == self._last else 0.0
        self._last = count
        slow = self._elapsed >= self._timeout and count - self._start < MIN_BYTES_PER_SECOND * self._elapsed
        return slow or self._quiet >= self._timeout


class DeadlineProtocol(IdleProtocol):
    """uvicorn HTTP protocol that aborts requests that are sent, and responses that are read, too slowly."""

    _incoming: TransferProgress | None = None
    _received = 0
    _outgoing: TransferProgress | None = None
    _unsent = 0
    _progress_timer: TimerHandle | None = None
    _checked_at = 0.0
    _was_paused = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.transfers = self.app.transfers if isinstance(self.app, Gateway) else Transfers()
        shortest = min(self.transfers.read_timeout, self.transfers.write_timeout)
        self._interval = min(_MAX_INTERVAL, shortest / _CHECKS_PER_TIMEOUT)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        # With these limits `pause_writing` is called when a write is not sent completely, `resume_writing` when it is.
        # A TLS transport pauses from its limit on, a plain one above it: with 0, TLS pauses when nothing is unsent.
        transport.set_write_buffer_limits(high=0 if transport.get_extra_info("sslcontext") is None else 1, low=0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self._response_sent()
        if self._progress_timer is not None:
            self._progress_timer.cancel()

    def pause_writing(self) -> None:
        """The kernel's send buffer is full: the client reads more slowly than the response is written."""
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()  # uvloop frees a buffer after its last byte is sent
        self.transfers.hold(self._unsent)
        self._outgoing = TransferProgress(self.transfers.write_timeout, self._sent())
        self._start_timer()

    def resume_writing(self) -> None:
        """The write buffer is empty."""
        super().resume_writing()
        self._response_sent()

    def on_request_timeout(self) -> None:
        """Called when a request is received too slowly."""
        raise NotImplementedError

    def _received_in_part(self, size: int) -> None:
        """Count received bytes of a request that is still incomplete."""
        if not self._received:
            self._incoming = TransferProgress(self.transfers.read_timeout)
        self._received += size
        self._start_timer()

    def _response_sent(self) -> None:
        self.transfers.release(self._unsent)
        self._unsent, self._outgoing = 0, None

    def _start_timer(self) -> None:
        if self._progress_timer is None:
            self._checked_at = self.loop.time()
            self._was_paused = self.flow.read_paused
            self._progress_timer = self.loop.call_later(self._interval, self._check_progress)

    def _check_progress(self) -> None:
        self._progress_timer = None
        seconds = min(self.loop.time() - self._checked_at, 2 * self._interval)
        if self._outgoing is not None and self._outgoing.is_too_slow(self._sent(), seconds):
            self.transport.abort()
            return
        incoming = self._incoming if self._receiving else None
        if incoming is not None:
            paused = self._was_paused or self.flow.read_paused
            if incoming.is_too_slow(self._received, 0.0 if paused else seconds):
                self.on_request_timeout()
                incoming = None
        if incoming is not None or self._outgoing is not None:
            self._start_timer()

    def _sent(self) -> int:
        """A counter of the bytes that the client's TCP has acknowledged; its start value is arbitrary."""
        return -self.transport.get_write_buffer_size() - _unacknowledged(self.transport)


def _unacknowledged(transport: Transport) -> int:
    """Bytes in the kernel's send buffer, or 0 if unknown.

    Needed because the kernel takes more from the write buffer only in large steps, seldom for a slow client.
    """
    try:
        size = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, OSError, ValueError):
        return 0
    return int(struct.unpack("i", size)[0])

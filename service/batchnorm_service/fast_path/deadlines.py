"""Deadlines of a request on its way in and of a response on its way out: one timer per connection that looks at both.

The timer runs only while a request has come in part or a response waits for its reader, so a small call sets none.
Time is counted from look to look. What the server itself makes a request wait for does not count: a look that comes
late because the event loop was busy, or during which reading was paused.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from asyncio import TimerHandle, Transport
from typing import Any, Final

from batchnorm_service.fast_path.keep_alive import IdleProtocol
from batchnorm_service.rest import Gateway, Transfers

SLOWEST_RATE: Final = 1024
"""Bytes per second that a request or a response must make on average, once it has taken as long as its timeout."""

_LOOKS: Final = 8
_LONGEST_INTERVAL: Final = 1.0


class Progress:
    """Whether a transfer goes on, as seen by looks at a counter of its bytes.

    Args:
        timeout: seconds without a byte that are too many, and after which the average rate counts.
        start: the counter at the transfer's first byte.
    """

    __slots__ = ("_elapsed", "_last", "_quiet", "_start", "_timeout")

    def __init__(self, timeout: float, start: int = 0) -> None:
        self._timeout = timeout
        self._start = start
        self._last: int | None = None
        self._elapsed = 0.0
        self._quiet = 0.0

    def is_too_slow(self, count: int, seconds: float) -> bool:
        """A look at the counter, `seconds` after the one before. The first look only starts the clock."""
        if self._last is not None:
            self._elapsed += seconds
            self._quiet = self._quiet + seconds if count == self._last else 0.0
        self._last = count
        slow = self._elapsed >= self._timeout and count - self._start < SLOWEST_RATE * self._elapsed
        return slow or self._quiet >= self._timeout


class DeadlineProtocol(IdleProtocol):
    """uvicorn's HTTP protocol, which gives up requests that come too slowly and responses that are read too slowly."""

    _incoming: Progress | None = None
    _received = 0
    _outgoing: Progress | None = None
    _unsent = 0
    _glance: TimerHandle | None = None
    _glanced_at = 0.0
    _was_paused = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.transfers = self.app.transfers if isinstance(self.app, Gateway) else Transfers()
        shortest = min(self.transfers.read_timeout, self.transfers.write_timeout)
        self._interval = min(_LONGEST_INTERVAL, shortest / _LOOKS)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        # With these limits `pause_writing` says that a response has not left, `resume_writing` that it has.
        transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self._response_left()
        if self._glance is not None:
            self._glance.cancel()

    def pause_writing(self) -> None:
        """The kernel does not take all of a response: its reader is slower."""
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()  # kept whole until its last byte has left
        self.transfers.hold(self._unsent)
        self._outgoing = Progress(self.transfers.write_timeout, self._sent())
        self._watch()

    def resume_writing(self) -> None:
        """The kernel has taken all."""
        super().resume_writing()
        self._response_left()

    def request_is_late(self) -> None:
        """A request comes too slowly."""
        raise NotImplementedError

    def _received_in_part(self, size: int) -> None:
        """So many bytes have come, and a request has not ended with them."""
        if not self._received:
            self._incoming = Progress(self.transfers.read_timeout)
        self._received += size
        self._watch()

    def _response_left(self) -> None:
        self.transfers.release(self._unsent)
        self._unsent, self._outgoing = 0, None

    def _watch(self) -> None:
        if self._glance is None:
            self._glanced_at = self.loop.time()
            self._was_paused = self.flow.read_paused
            self._glance = self.loop.call_later(self._interval, self._look_at_progress)

    def _look_at_progress(self) -> None:
        self._glance = None
        seconds = min(self.loop.time() - self._glanced_at, 2 * self._interval)
        if self._outgoing is not None and self._outgoing.is_too_slow(self._sent(), seconds):
            self.transport.abort()
            return
        incoming = self._incoming if self._receiving else None
        if incoming is not None:
            paused = self._was_paused or self.flow.read_paused
            if incoming.is_too_slow(self._received, 0.0 if paused else seconds):
                self.request_is_late()
                incoming = None
        if incoming is not None or self._outgoing is not None:
            self._watch()

    def _sent(self) -> int:
        """A counter of the bytes that the client's side has acknowledged; it starts anywhere."""
        return -self.transport.get_write_buffer_size() - _unacknowledged(self.transport)


def _unacknowledged(transport: Transport) -> int:
    """Bytes in the kernel's send buffer, where it tells: it takes more in large steps only, and slow readers seldom."""
    try:
        found = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, OSError, ValueError):
        return 0
    return int(struct.unpack("i", found)[0])

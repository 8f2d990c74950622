"""Limits on connections and on what a request has besides its body."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final, Protocol

from batchnorm_client.wire.errors import Overloaded, PayloadTooLarge

MIN_IDLE_SECONDS: Final = 1.0
"""Connections that were idle for less are not closed to make room: their next request may be on its way."""

_SEARCH_SECONDS: Final = 0.1
_MOST_REFUSED: Final = 256


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits on a request without its body.

    Attributes:
        header_bytes: maximum size of a request line with headers and trailers, which are in memory while they arrive.
        headers: maximum number of headers and trailers.
        url_bytes: maximum length of the request's target: path and query.
    """

    header_bytes: int = 1 << 16
    headers: int = 256
    url_bytes: int = 1 << 15

    def check(self, url_bytes: int, headers: int, header_bytes: int) -> None:
        """Raise `PayloadTooLarge` if a request exceeds a limit; it names the setting."""
        if url_bytes > self.url_bytes:
            raise _too_large("URL is longer", f"{self.url_bytes} bytes", "URL_BYTES", self.url_bytes, url_bytes)
        if headers > self.headers:
            raise _too_large("headers and trailers are more", str(self.headers), "HEADERS", self.headers, headers)
        if header_bytes > self.header_bytes:
            most = self.header_bytes
            raise _too_large("headers and trailers are larger", f"{most} bytes", "HEADER_BYTES", most, header_bytes)


def _too_large(what: str, limit: str, setting: str, expected: int, got: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the request's {what} than the {limit} that BATCHNORM_MAX_{setting} allows", expected=expected, got=got
    )


class Connection(Protocol):
    """What is asked of a connection.

    Attributes:
        idle_since: when it became idle, in seconds of the event loop's clock; infinite while it is in use.
    """

    @property
    def idle_since(self) -> float: ...  # noqa: D102

    def close_idle(self) -> None:
        """Close it. It is removed from the pool once it is closed."""
        ...


class Connections:
    """The open connections of a process. At the limit, those that were idle longest make room for new ones.

    Args:
        most: maximum number of connections.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._closing: set[Connection] = set()
        self._refused: set[Connection] = set()
        self._search_at = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection, now: float) -> Overloaded | None:
        """Add a new connection, or return why it is refused. The caller must call `remove` in either case.

        Args:
            connection: the connection.
            now: seconds of the clock of `idle_since`.
        """
        if len(self._open) >= self._most and not self._make_room(now):
            self._refused.add(connection)
            return Overloaded(
                f"{self._most} connections are open, and none is idle: BATCHNORM_MAX_CONNECTIONS", retry_after=1
            )
        self._open.add(connection)
        return None

    def remove(self, connection: Connection) -> None:
        """A connection is closed."""
        self._open.discard(connection)
        self._closing.discard(connection)
        self._refused.discard(connection)

    @property
    def many_refused(self) -> bool:
        """Whether so many refused connections are still open that further ones have to be aborted."""
        return len(self._refused) > _MOST_REFUSED

    def _make_room(self, now: float) -> bool:
        """Close connections that are idle; whether there is room.

        Looking at all connections takes a millisecond for 10,000. So several are closed at once, and it is some time
        before the next look.
        """
        if now >= self._search_at and len(self._open) - len(self._closing) >= self._most:
            self._search_at = now + _SEARCH_SECONDS
            candidates = self._open - self._closing
            idle = [each for each in candidates if each.idle_since <= now - MIN_IDLE_SECONDS]
            for each in heapq.nsmallest(self._most // 64 + 1, idle, key=lambda each: each.idle_since):
                self._closing.add(each)
                each.close_idle()
        return len(self._open) - len(self._closing) < self._most

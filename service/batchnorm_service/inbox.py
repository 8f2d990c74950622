"""Bodies on their way in: the rest of a large one goes from the socket straight into its buffer.

The ordinary way copies each piece three times: the event loop out of its own buffer, the HTTP parser out of that
piece, and `direct` into the body. Without them a train call of 8 MiB is a tenth quicker (`benchmarks/README.md`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_NOTHING: Final = memoryview(b"")


class Inbox(asyncio.BufferedProtocol):
    """Stands in for a connection's protocol while a body comes, and takes not one byte more than that.

    Args:
        protocol: the connection's own, which hears of everything else.
        buffer: to be filled.
        received: is called with the number of bytes that have come, each time some have.
    """

    def __init__(self, protocol: asyncio.Protocol, buffer: memoryview, received: Callable[[int], None]) -> None:
        self._protocol = protocol
        self._rest = buffer
        self._received = received

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._rest

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        # uvloop keeps this object until the next one comes, and an empty view of the body would keep all of it.
        self._rest = self._rest[nbytes:] or _NOTHING
        self._received(nbytes)

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take what is sent."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """It takes it again."""
        self._protocol.resume_writing()


def redirect(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
    """Let another protocol read from here on: which kind it is, event loops look at when reading begins."""
    transport.pause_reading()
    transport.set_protocol(protocol)
    transport.resume_reading()

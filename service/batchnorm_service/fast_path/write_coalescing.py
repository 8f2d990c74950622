"""Answers on their way out: the small writes of one turn of the event loop leave after it, each answer in one piece.

uvicorn writes the head of an answer and then its body, and each write goes to the kernel at once and wakes the client.
That costs more than normalizing a small batch, and when it is done, the processor has forgotten the code of the next
request (measured in `benchmarks/README.md`). So first everything that has arrived is computed, then it is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final, cast

from batchnorm_service.fast_path.trailers import TrailerProtocol

_AT_ONCE: Final = 1 << 16
"""Writes from this size on go out directly: joining them to others would cost a copy that counts."""

Data = bytes | bytearray | memoryview


class CoalescingProtocol(TrailerProtocol):
    """uvicorn's HTTP protocol over a `WriteCoalescer`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, WriteCoalescer(transport, self.loop)))


class WriteCoalescer:
    """A transport that gathers small writes until the event loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[Data] = []

    def write(self, data: Data) -> None:
        """Send this after whatever was written before, soon."""
        if len(data) >= _AT_ONCE:
            self._flush()
            if not self._transport.is_closing():
                self._transport.write(data)
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def writelines(self, pieces: Iterable[Data]) -> None:
        """Send these after whatever was written before, without joining them."""
        self._flush()
        if not self._transport.is_closing():  # a response that was read too slowly is dropped while it is written
            self._transport.writelines(pieces)

    def close(self) -> None:
        """Send what is left, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data = b"".join(self._held)
            self._held.clear()
            if not self._transport.is_closing():  # of several pipelined requests, one may not know that the client left
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

"""Coalesces the small writes of one event loop iteration: a response's head and body become one system call.

uvicorn writes head and body separately, and each write is a system call that wakes the client. That costs more than
normalizing a small batch, and evicts the code of the next request from the processor's caches (measured in
`benchmarks/README.md`). So all received requests are computed first, then their responses are sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final, cast

from batchnorm_service.fast_path.trailers import TrailerProtocol

_DIRECT_WRITE_BYTES: Final = 1 << 16
"""Writes of at least this size are not coalesced: the copy would cost more than the system call."""

_TLS_BLOCK_BYTES: Final = 1 << 16

Data = bytes | bytearray | memoryview


class CoalescingProtocol(TrailerProtocol):
    """uvicorn HTTP protocol that writes to a `WriteCoalescer`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, WriteCoalescer(transport, self.loop)))


class WriteCoalescer:
    """Transport wrapper that buffers small writes until the next iteration of the event loop.

    Large writes to a TLS transport are split. It encrypts a write at once and hands it to the TCP transport below,
    whose buffer it does not count as unsent; only the writes after that are held back, counted, and have a deadline.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._tls = transport.get_extra_info("sslcontext") is not None
        self._loop = loop
        self._pending: list[Data] = []

    def write(self, data: Data) -> None:
        """Send data after everything written before, at the latest in the next iteration."""
        if len(data) >= _DIRECT_WRITE_BYTES:
            self._flush()
            self._write_now((data,))
            return
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def writelines(self, pieces: Iterable[Data]) -> None:
        """Send several buffers after everything written before, without copying them."""
        self._flush()
        self._write_now(pieces)

    def close(self) -> None:
        """Send what is buffered, then close."""
        self._flush()
        self._transport.close()

    def _write_now(self, pieces: Iterable[Data]) -> None:
        if self._transport.is_closing():  # the write timeout may have aborted the connection
            return
        if self._tls:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                for start in range(0, len(view), _TLS_BLOCK_BYTES):
                    self._transport.write(view[start : start + _TLS_BLOCK_BYTES])
        else:
            self._transport.writelines(pieces)

    def _flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending)
            self._pending.clear()
            if not self._transport.is_closing():  # a pipelined request may not know of the disconnect
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

"""Reading request bodies into one buffer, up to a size limit."""

from __future__ import annotations

from typing import Final

import numpy as np
from starlette.types import Receive

from batchnorm_client.wire.errors import MalformedBody, Overloaded, PayloadTooLarge

from .headers import Headers

_MAX_PIECES: Final = 64
_MAX_PIECE_BYTES: Final = 1 << 20
_GROWTH: Final = 64


class ClientGoneError(Exception):
    """The client closed the connection: there is nobody to respond to."""


class BodyBuffer:
    """Buffer for a request body with a Content-Length.

    Memory grows with the bytes received, not with the Content-Length, so announcing a large body costs nothing. Up to
    1 MiB the pieces are kept in a list. Then they are copied into a buffer of at most 64 times the received size,
    whose pages the kernel allocates only when they are written.

    Args:
        size: the Content-Length in bytes.

    Attributes:
        filled: bytes received so far.
    """

    __slots__ = ("_buffer", "_pieces", "_size", "filled")

    def __init__(self, size: int) -> None:
        self.filled = 0
        self._size = size
        self._pieces: list[bytes | memoryview] = []
        self._buffer = memoryview(bytearray())

    def add(self, piece: bytes | memoryview) -> None:
        """Append the next piece. The caller ensures that no more than `size` bytes are added.

        Raises:
            Overloaded: memory for the buffer cannot be allocated.
        """
        end = self.filled + len(piece)
        if end > len(self._buffer):
            if end < self._size and end < _MAX_PIECE_BYTES and len(self._pieces) < _MAX_PIECES:
                self._pieces.append(piece)
                self.filled = end
                return
            self._grow(min(self._size, end * _GROWTH))
        self._buffer[self.filled : end] = piece
        self.filled = end

    def take(self) -> memoryview:
        """The bytes received so far, writable."""
        if self._pieces:
            self._grow(self.filled)
        return self._buffer[: self.filled]

    def _grow(self, size: int) -> None:
        try:
            grown = np.empty(size, np.uint8).data
        except MemoryError:
            raise Overloaded(f"there is no memory for a body of {self._size} bytes", retry_after=1) from None
        begin = 0
        for part in (self._buffer[: self.filled], *self._pieces):
            grown[begin : begin + len(part)] = part
            begin += len(part)
        self._pieces.clear()
        self._buffer = grown


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytearray | memoryview:
    """Read the whole body; the result is writable.

    Raises:
        PayloadTooLarge: it is larger than `limit`; checked before reading if there is a Content-Length.
        MalformedBody: its length differs from its Content-Length.
        Overloaded: memory for it cannot be allocated.
        ClientGoneError: the connection was closed first.
    """
    announced = headers.get(b"content-length")
    if announced is None:
        return await _read_chunked(receive, limit)
    announced = announced.strip(b" \t")  # optional whitespace (RFC 9110, 5.6.3), which the parser does not strip
    if not announced.isdigit():
        raise MalformedBody("Content-Length is not a number", field="Content-Length")
    if len(announced.lstrip(b"0")) > 18 or (size := int(announced)) > limit:
        raise _too_large(limit, int(announced[:100]))
    chunk, more = await _chunk(receive)
    if not more:
        if len(chunk) != size:
            raise _wrong_length(size)
        return chunk if isinstance(chunk, memoryview) else bytearray(chunk)
    buffer = BodyBuffer(size)
    while True:
        if buffer.filled + len(chunk) > size:
            raise _wrong_length(size)
        buffer.add(chunk)
        if not more:
            break
        chunk, more = await _chunk(receive)
    if buffer.filled != size:
        raise _wrong_length(size)
    return buffer.take()


async def _read_chunked(receive: Receive, limit: int) -> bytearray:
    body = bytearray()
    more = True
    while more:
        chunk, more = await _chunk(receive)
        if len(body) + len(chunk) > limit:
            raise _too_large(limit, None)
        body += chunk
    return body


async def _chunk(receive: Receive) -> tuple[bytes | memoryview, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


def _too_large(limit: int, announced: int | None) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body is larger than the {limit} bytes that BATCHNORM_MAX_BODY_BYTES allows; send smaller batches, raise "
        "the setting, or send moments instead of batches, as train_local of the Python client does",
        expected=limit,
        got=announced,
    )


def _wrong_length(size: int) -> MalformedBody:
    return MalformedBody(f"the body is not as long as its Content-Length, {size}", field="Content-Length")

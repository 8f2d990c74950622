"""Request bodies: into one buffer, never larger than the limit."""

from __future__ import annotations

from typing import Final

import numpy as np
from starlette.types import Receive

from batchnorm_client.wire.errors import MalformedBody, Overloaded, PayloadTooLarge

from .headers import Headers

_MOST_PIECES: Final = 64
_MOST_BYTES_IN_PIECES: Final = 1 << 20
_GROWTH: Final = 64


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete. Nobody waits for an answer."""


class BodyBuffer:
    """A body whose length was announced, as it comes.

    What it takes of the memory follows what has come, not what was announced: up to 1 MiB the pieces are kept as they
    are; then they are copied into a buffer of at most 64 times that, whose pages are touched only as it fills.

    Args:
        size: the announced length in bytes.

    Attributes:
        filled: how many bytes have come.
    """

    __slots__ = ("_buffer", "_pieces", "_size", "filled")

    def __init__(self, size: int) -> None:
        self.filled = 0
        self._size = size
        self._pieces: list[bytes | memoryview] = []
        self._buffer = memoryview(bytearray())

    def add(self, piece: bytes | memoryview) -> None:
        """Take the next piece; the caller sees to it that there are no more bytes than announced.

        Raises:
            Overloaded: there is no memory for it.
        """
        end = self.filled + len(piece)
        if end > len(self._buffer):
            if end < self._size and end < _MOST_BYTES_IN_PIECES and len(self._pieces) < _MOST_PIECES:
                self._pieces.append(piece)
                self.filled = end
                return
            self._grow(min(self._size, end * _GROWTH))
        self._buffer[self.filled : end] = piece
        self.filled = end

    def take(self) -> memoryview:
        """What has come, writable; the whole body if it is complete."""
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
    """The whole body, writable.

    With a Content-Length (all but a few do send one) the body goes chunk by chunk into a `BodyBuffer`: announcing a
    large body costs the service nothing.

    Raises:
        PayloadTooLarge: it is larger than `limit`; found before anything is read if there is a Content-Length.
        MalformedBody: it has another length than announced.
        Overloaded: there is no memory for it.
        ClientGoneError: the connection was closed first.
    """
    announced = headers.get(b"content-length")
    if announced is None:
        return await _read_chunked(receive, limit)
    announced = announced.strip(b" \t")  # optional whitespace (RFC 9110, 5.6.3), which the parser leaves behind
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

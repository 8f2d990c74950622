"""Trailers and chunk extensions of chunked requests: dropped, but counted towards the size limit of the head."""

from __future__ import annotations

from typing import Any, Final, cast

from batchnorm_service.fast_path.deadlines import DeadlineProtocol

_CHUNKED_BYTES: Final = 9
"""Bytes of a body of which each byte is a chunk, for each of these: size, line breaks, the byte, and some extension."""


class TrailerProtocol(DeadlineProtocol):
    """uvicorn HTTP protocol with a limit on what a chunked request has besides its body.

    uvicorn would append trailers to the headers without limit, and the parser skips chunk extensions of any length.
    """

    _head_bytes = 0
    """Size of the request line, headers and trailers so far; 0 for a head that came in one piece."""

    _head_fields = 0
    """Number of headers and trailers so far."""

    _body_bytes = 0
    """Bytes of a body in the data that is being read."""

    _in_trailers = False
    _counted = -1
    """`_head_bytes` after the previous data if that ended within trailers, otherwise -1."""

    def on_chunk_header(self) -> None:
        """A chunk begins. The last chunk has no data but may have trailers, which uvicorn appends to `headers`."""
        self._in_trailers, self._counted = True, -1
        self.headers = cast(Any, _Trailers(self))  # the list of headers was already passed to the application

    def on_chunk_complete(self) -> None:
        """A chunk, or after the last one the trailers, have been read."""
        self._in_trailers = False

    def on_body(self, body: bytes) -> None:
        """A piece of a body has been read: this chunk is not the last."""
        self._in_trailers = False
        self._body_bytes += len(body)
        super().on_body(body)

    def count_trailer(self, size: int) -> None:
        """Count another trailer of `size` bytes. Raises `PayloadTooLarge` if a limit is exceeded."""
        self._head_bytes += size
        self._head_fields += 1
        self.check_head()

    def check_head(self) -> None:
        """Raises `PayloadTooLarge` if the request line, headers and trailers that have come exceed a limit."""
        raise NotImplementedError

    def count_framing(self, size: int) -> None:
        """Count data of `size` bytes, all of it after the head and before the trailers: body, and sizes of chunks."""
        self._head_bytes += max(0, size - _CHUNKED_BYTES * self._body_bytes)

    def _received_in_part(self, size: int) -> None:
        super()._received_in_part(size)
        if self._in_trailers:
            if self._counted == self._head_bytes:  # no trailer ended: all of the data belongs to one that is incomplete
                self._head_bytes += size
            self._counted = self._head_bytes


class _Trailers:
    """Replacement for uvicorn's list of headers that counts trailers instead of storing them."""

    def __init__(self, protocol: TrailerProtocol) -> None:
        self._protocol = protocol

    def append(self, trailer: tuple[bytes, bytes]) -> None:
        name, value = trailer
        self._protocol.count_trailer(len(name) + len(value) + 4)  # 4: ": " and CRLF

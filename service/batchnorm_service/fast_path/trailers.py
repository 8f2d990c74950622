"""Trailers of chunked requests: nothing here reads them, so they are counted as headers are, and dropped."""

from __future__ import annotations

from typing import Any, Final, cast

from batchnorm_service.fast_path.deadlines import DeadlineProtocol

MOST_HEAD_BYTES: Final = 1 << 16
"""A request line with its headers and trailers; what is read of one that has not ended yet is kept in memory."""


class HeadTooLargeError(Exception):
    """The headers and trailers of a request are larger than `MOST_HEAD_BYTES`."""


class TrailerProtocol(DeadlineProtocol):
    """uvicorn's HTTP protocol, which would append trailers to the headers without end."""

    _head_bytes = 0
    _in_trailers = False
    _counted = -1
    """`_head_bytes` when the piece before ended in trailers, otherwise -1."""

    def on_chunk_header(self) -> None:
        """A chunk begins. The last one has no data: trailers come instead, and uvicorn appends them to `headers`."""
        self._in_trailers, self._counted = True, -1
        self.headers = cast(Any, _Trailers(self))  # the application has the list of headers

    def on_chunk_complete(self) -> None:
        """A chunk, or after the last one the trailers, have been read."""
        self._in_trailers = False

    def on_body(self, body: bytes) -> None:
        """A piece of a body: these were no trailers yet."""
        self._in_trailers = False
        super().on_body(body)

    def count_trailer(self, size: int) -> None:
        """So many bytes more were trailers.

        Raises:
            HeadTooLargeError: there were too many.
        """
        self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            raise HeadTooLargeError

    def _received_in_part(self, size: int) -> None:
        super()._received_in_part(size)
        if self._in_trailers:
            if self._counted == self._head_bytes:  # the whole piece belongs to one trailer, which has no end yet
                self._head_bytes += size
            self._counted = self._head_bytes


class _Trailers:
    """What stands where uvicorn has the list of headers, once they are read."""

    def __init__(self, protocol: TrailerProtocol) -> None:
        self._protocol = protocol

    def append(self, trailer: tuple[bytes, bytes]) -> None:
        name, value = trailer
        self._protocol.count_trailer(len(name) + len(value) + 4)  # with the colon, the space and the end of the line

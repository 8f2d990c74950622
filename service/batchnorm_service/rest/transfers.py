"""Bytes on their way: what all connections of a process share, deadlines and one bound on what is kept meanwhile."""

from __future__ import annotations

from batchnorm_client.wire.errors import Overloaded


class Transfers:
    """Deadlines of requests and responses, and the bytes of incomplete bodies and unsent responses.

    New requests are refused from `max_buffered_bytes` on. Bodies that were let in before may go on, up to one largest
    body beyond it; then they are refused as well, so that the memory is bounded however many were let in.

    Args:
        read_timeout: seconds; a request is refused when nothing of it came for so long, or too little in the mean.
        write_timeout: seconds; the same for a response.
        max_buffered_bytes: new requests are refused while so much is buffered.
        max_body_bytes: the largest body.

    Attributes:
        buffered: bytes that have come of incomplete bodies, and bytes of responses that have not been sent.
    """

    def __init__(
        self,
        read_timeout: float = 30.0,
        write_timeout: float = 30.0,
        max_buffered_bytes: int = 1 << 30,
        max_body_bytes: int = 64 << 20,
    ) -> None:
        self.read_timeout = read_timeout
        self.write_timeout = write_timeout
        self.buffered = 0
        self._max_buffered_bytes = max_buffered_bytes
        self._most = max_buffered_bytes + max_body_bytes

    def check(self) -> None:
        """Refuse a new request while too much is buffered.

        Raises:
            Overloaded: it is.
        """
        if self.buffered >= self._max_buffered_bytes:
            raise _overloaded()

    def receive(self, size: int) -> None:
        """Count `size` more bytes of a body.

        Raises:
            Overloaded: there is no room for them; they are not counted.
        """
        if self.buffered + size > self._most:
            raise _overloaded()
        self.buffered += size

    def hold(self, size: int) -> None:
        """Count `size` more bytes of a response: it exists already."""
        self.buffered += size

    def release(self, size: int) -> None:
        """So many bytes are no longer on their way."""
        self.buffered -= size


def _overloaded() -> Overloaded:
    return Overloaded("too many bytes of requests and responses are on their way", retry_after=1)

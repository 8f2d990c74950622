"""Timeouts of requests and responses, and a limit on buffered bytes that all connections of a process share."""

from __future__ import annotations

from batchnorm_client.wire.errors import Overloaded


class Transfers:
    """Timeouts, and the count of buffered bytes of incomplete requests and unsent responses.

    At `max_buffered_bytes`, new requests are refused. Requests admitted before may continue until one more body of
    `max_body_bytes` is buffered; then they are refused too, so memory is bounded however many were admitted.

    Args:
        read_timeout: seconds without a received byte after which a request is refused, and after which its average
            rate is checked.
        write_timeout: the same for sending a response.
        max_buffered_bytes: new requests are refused while this many bytes are buffered.
        max_body_bytes: the largest request body.

    Attributes:
        buffered: received bytes of incomplete bodies plus unsent bytes of responses.
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
        self._hard_limit = max_buffered_bytes + max_body_bytes

    def check(self) -> None:
        """Check whether a new request may start.

        Raises:
            Overloaded: too many bytes are buffered.
        """
        if self.buffered >= self._max_buffered_bytes:
            raise _overloaded()

    def receive(self, size: int) -> None:
        """Count `size` more received bytes of a body.

        Raises:
            Overloaded: the limit would be exceeded; they are not counted.
        """
        if self.buffered + size > self._hard_limit:
            raise _overloaded()
        self.buffered += size

    def hold(self, size: int) -> None:
        """Count `size` more unsent bytes of a response; never refused, as the response exists already."""
        self.buffered += size

    def release(self, size: int) -> None:
        """Subtract `size` bytes that are no longer buffered."""
        self.buffered -= size


def _overloaded() -> Overloaded:
    return Overloaded("too many bytes of requests and responses are buffered", retry_after=1)

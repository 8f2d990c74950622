"""A call as a value, and the response to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from batchnorm_client.wire.errors import BatchNormError
from batchnorm_client.wire.tensors.tensor import Buffer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Response:
    """What came back.

    Attributes:
        status: the HTTP status code.
        headers: by names in lower case, or a mapping that does not mind.
        body: all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: Buffer

    @property
    def media_type(self) -> str:
        """The Content-Type without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """A call: what to send, how to read the response, and what may be done when none comes.

    Attributes:
        method: HTTP's.
        target: path and query, from the service's root on.
        read: makes the result of a response with one of `statuses`. Raises ValueError or LookupError when the response
            is not what the contract says.
        statuses: those that `read` takes; all others are errors.
        headers: what to send beside what every call sends.
        pieces: the body, in buffers that are sent one after the other.
        reads: the call changes nothing in the service.
        repeat_if_unknown: whether the call may be sent again when an earlier try may have taken effect: because it
            carries a key, sets values, or has a condition that cannot hold twice.
        confirm: when an earlier try may have taken effect, makes the call that finds out after this error: a call that
            only reads, and either finds the result or raises the error. None to go on with this call.
        waits: seconds for which the service may wait on purpose before it responds: the read timeout and the deadline
            are as much later.
    """

    method: str
    target: str
    read: Callable[[Response], T]
    statuses: tuple[int, ...] = (200,)
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[Buffer] = ()
    reads: bool = False
    repeat_if_unknown: bool = True
    confirm: Callable[[BatchNormError], Request[T] | None] | None = None
    waits: float = 0.0

    @property
    def size(self) -> int:
        """The body's length in bytes."""
        return sum(piece.nbytes if isinstance(piece, memoryview) else len(piece) for piece in self.pieces)

"""The request of a call as a value, and the response to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from batchnorm_client.wire.errors import BatchNormError
from batchnorm_client.wire.tensors.tensor import Buffer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response.

    Attributes:
        status: the HTTP status code.
        headers: by name in lower case, or a case-insensitive mapping.
        body: the complete body.
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
    """What to send, how to read the response, and what to do when there is none.

    Attributes:
        method: the HTTP method.
        target: path and query, relative to the service's root.
        read: converts a response with one of `statuses` to the result. Raises ValueError or LookupError when the
            response is not as specified.
        statuses: those that `read` accepts; all others are errors.
        headers: headers in addition to those of every request.
        pieces: the body, in buffers that are sent one after the other.
        reads: whether the call changes nothing in the service.
        repeat_if_unknown: whether the call may be sent again when an earlier attempt may have taken effect: because it
            carries a key, sets values, or has a precondition that cannot hold twice.
        confirm: called after an error, when an earlier attempt may have taken effect. Returns the request that finds
            out: it only reads, and its `read` returns the result or raises the error. None to send this request again.
        waits: seconds that the service may wait on purpose before it responds; the read timeout and the deadline are
            extended by as much.
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

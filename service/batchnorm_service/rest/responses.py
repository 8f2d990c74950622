"""Responses whose body is a list of buffers, sent without being joined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any, Final, Self

import orjson
from starlette import responses
from starlette.types import Receive, Scope, Send

from batchnorm_client.wire.headers import DIGEST, IDEMPOTENT_REPLAY
from batchnorm_client.wire.media_types import JSON
from batchnorm_client.wire.tensors import Tensor, codec, json_pieces
from batchnorm_service.layers import Layers, Snapshot
from batchnorm_service.telemetry.metrics import STATUS_CLASSES

from .preconditions import etag

RawHeader = tuple[bytes, bytes]
Piece = bytes | bytearray | memoryview

JSON_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z
RAW_DIGEST: Final = DIGEST.lower().encode()
REPLAYED: Final[RawHeader] = (IDEMPOTENT_REPLAY.lower().encode(), b"true")

_NUMBER_BYTES: Final = 16
"""Approximate length of a number with its comma in JSON: 11 bytes for float32, 20 for float64."""

JOIN_BYTES: Final = 1 << 16
"""Bodies up to this size are sent as one message: copying them costs less than a second message."""


class Response(responses.Response):
    """A response whose body is a list of buffers, for ASGI and the fast path.

    Attributes:
        problem: the name of the problem type that it reports, if any.
    """

    problem: str | None = None

    def __init__(
        self, status: int, media_type: str | None, pieces: Sequence[Piece], headers: Iterable[RawHeader] = ()
    ) -> None:
        # Not calling super().__init__, which would copy and encode the body.
        self.status_code = status
        self.pieces = pieces
        self.size = 0
        for piece in pieces:
            self.size += piece.nbytes if isinstance(piece, memoryview) else len(piece)
        self.background = None
        self.raw_headers = list(headers)
        if media_type is not None:
            self.raw_headers.append((b"content-type", media_type.encode()))
            self.raw_headers.append((b"content-length", b"%d" % self.size))

    @property
    def outcome(self) -> str:
        """One of `telemetry.metrics.OUTCOMES`."""
        return self.problem or STATUS_CLASSES[self.status_code // 100]

    def copy(self) -> Self:
        """A response with the same body, and headers of its own."""
        copied = copy(self)
        copied.raw_headers = [*self.raw_headers]
        return copied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response as ASGI messages."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self.size <= JOIN_BYTES:
            await send({"type": "http.response.body", "body": b"".join(self.pieces)})
            return
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def respond_json(status: int, value: Any, headers: Iterable[RawHeader] = ()) -> Response:
    """A response with a JSON document."""
    return Response(status, JSON, [orjson.dumps(value, option=JSON_OPTIONS)], headers)


def respond_empty(status: int, headers: Iterable[RawHeader] = ()) -> Response:
    """A response without a body, such as 204 and 304."""
    return Response(status, None, [], headers)


def text_bytes(form: str, tensors: Iterable[Tensor]) -> int:
    """About how many bytes encoding writes as text in this media type; 0 for binary ones, which send buffers as is."""
    return sum(_NUMBER_BYTES * math.prod(tensor.shape) for tensor in tensors) if codec(form).text else 0


async def respond_with_layer(
    layers: Layers, status: int, layer: Snapshot, headers: Iterable[RawHeader] = (), *, replayed: bool = False
) -> Response:
    """A response with the JSON document `Layer`; a large one is encoded in a thread.

    A replayed response has the version of the first call but the tensors of the current state, hence no ETag.
    """
    tags = [REPLAYED] if replayed else [(b"etag", etag(layer.version))]
    size = text_bytes(JSON, layer.tensors.values())
    return await layers.encode(size, _respond_with_layer, status, layer, [*tags, *headers])


def _respond_with_layer(status: int, layer: Snapshot, headers: Iterable[RawHeader]) -> Response:
    document: dict[str, Any] = {
        "name": layer.name,
        "config": layer.config.model_dump(),
        "version": layer.version,
        "num_batches_tracked": layer.num_batches_tracked,
        "samples_tracked": layer.samples_tracked,
    }
    for name in ("running_mean", "running_var", "weight", "bias"):
        document[name] = layer.tensors.get(name)
    document["digest"] = layer.digest
    document["created_at"] = layer.created_at
    document["updated_at"] = layer.updated_at
    return Response(status, JSON, json_pieces(document), headers)

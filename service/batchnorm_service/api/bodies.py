"""Request bodies: into one buffer, never larger than the limit."""

from __future__ import annotations

import numpy as np
from starlette.types import Receive

from batchnorm_client.errors import MalformedBody, PayloadTooLarge

from .headers import Headers


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete. Nobody waits for an answer."""


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytearray | memoryview:
    """The whole body, writable.

    With a Content-Length (all but a few do send one) the body goes chunk by chunk into one buffer of that size. The
    buffer's pages are touched only as they fill: announcing a large body costs the service nothing.

    Raises:
        PayloadTooLarge: it is larger than `limit`; found before anything is read if there is a Content-Length.
        MalformedBody: it has another length than announced.
        ClientGoneError: the connection was closed first.
    """
    announced = headers.get(b"content-length")
    if announced is None:
        return await _read_chunked(receive, limit)
    if not announced.isdigit():
        raise MalformedBody("Content-Length is not a number", field="Content-Length")
    if len(announced) > 18 or (size := int(announced)) > limit:
        raise _too_large(limit, int(announced[:100]))
    chunk, more = await _chunk(receive)
    if not more:
        if len(chunk) != size:
            raise _wrong_length(size)
        return chunk if isinstance(chunk, memoryview) else bytearray(chunk)
    buffer = np.empty(size, np.uint8).data
    filled = 0
    while True:
        end = filled + len(chunk)
        if end > size:
            raise _wrong_length(size)
        buffer[filled:end] = chunk
        filled = end
        if not more:
            break
        chunk, more = await _chunk(receive)
    if filled != size:
        raise _wrong_length(size)
    return buffer


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

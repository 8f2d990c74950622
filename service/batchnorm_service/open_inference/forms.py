"""Media types of requests, which the protocol says little about."""

from __future__ import annotations

from typing import Final

from batchnorm_client.wire.media_types import JSON
from batchnorm_service.rest.headers import Headers
from batchnorm_service.rest.negotiation import content_type

OCTET_STREAM: Final = "application/octet-stream"
_TYPES: Final = (JSON, OCTET_STREAM)
_JSON: Final = JSON.encode()


def check_form(headers: Headers) -> None:
    """Check Content-Encoding and, if a web page sends the request, Content-Type.

    Clients of the protocol send any Content-Type, or none. A web page of another origin may do so too, without asking
    the server first (CORS); browsers then send Origin. Content types that they do ask for are accepted from them.

    Raises:
        UnsupportedMediaType: the body is compressed; or the request has Origin, and is neither JSON nor octet-stream.
    """
    if b"origin" not in headers:
        headers = {b"content-type": _JSON, b"content-encoding": headers.get(b"content-encoding", b"")}
    content_type(headers, _TYPES)

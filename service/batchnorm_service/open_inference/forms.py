"""Media types of requests: clients of the protocol send any Content-Type, or none."""

from __future__ import annotations

from typing import Final

from batchnorm_client.wire.media_types import JSON
from batchnorm_service.rest.headers import Headers
from batchnorm_service.rest.negotiation import content_type
from batchnorm_service.rest.security import refuse_other_sites

OCTET_STREAM: Final = "application/octet-stream"
_ENCODINGS: Final = frozenset({b"content-encoding", b"transfer-encoding"})
_JSON: Final = JSON.encode()


def check_form(headers: Headers) -> None:
    """Check everything about a body's form but its Content-Type.

    Raises:
        Forbidden: a web page of another site sends it: browsers do not ask before they send some content types.
        UnsupportedMediaType: the body is compressed.
    """
    refuse_other_sites(headers)
    if not _ENCODINGS.isdisjoint(headers):
        content_type({**headers, b"content-type": _JSON}, (JSON,))

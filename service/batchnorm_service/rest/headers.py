"""Request headers as a dict, and the two that carry a client's token: X-Request-ID and Idempotency-Key."""

from __future__ import annotations

import random
from collections.abc import Iterable

from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, KEY_PATTERN, REQUEST_ID

Headers = dict[bytes, bytes]
"""Header values by lower-case name; the values of a repeated header are joined by commas (RFC 9110, 5.3)."""

_IDEMPOTENCY_KEY = IDEMPOTENCY_KEY.lower().encode()
_REQUEST_ID = REQUEST_ID.lower().encode()


def read_headers(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of an ASGI scope as a dict."""
    pairs = list(raw)
    headers = dict(pairs)
    if len(headers) != len(pairs):
        values: dict[bytes, list[bytes]] = {}
        for name, value in pairs:
            values.setdefault(name, []).append(value)
        return {name: b", ".join(several) for name, several in values.items()}
    return headers


def request_id(headers: Headers) -> str:
    """The client's X-Request-ID if it is valid, otherwise a new random one."""
    given = headers.get(_REQUEST_ID)
    if given is not None:
        text = given.decode("latin-1")
        if KEY_PATTERN.fullmatch(text):
            return text
    return f"{random.getrandbits(128):032x}"  # need not be secret: os.urandom would cost a system call


def idempotency_key(headers: Headers) -> str | None:
    """The client's Idempotency-Key, or None.

    Raises:
        InvalidRequest: it is malformed or repeated (joined values contain a space, which a key may not).
    """
    given = headers.get(_IDEMPOTENCY_KEY)
    if given is None:
        return None
    key = given.decode("latin-1")
    if not KEY_PATTERN.fullmatch(key):
        raise InvalidRequest(
            "an Idempotency-Key is 1 to 200 characters of ASCII 0x21 to 0x7E, and there is only one",
            field=IDEMPOTENCY_KEY,
            expected=KEY_PATTERN.pattern,
        )
    return key

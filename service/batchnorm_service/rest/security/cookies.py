"""The cookie of the page's login: it has the token itself, so every process and every replica can read it.

Only paths under /ui read it: elsewhere a browser would send it along with requests that other sites make.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Final

from ..headers import Headers

NAME: Final = b"batchnorm_token"
MAX_AGE: Final = 12 * 3600
"""Seconds until the browser forgets the login."""

MAX_TOKEN: Final = 2900
"""Bytes. Browsers drop cookies of more than 4 KiB; in base64 a token is longer by a third."""


def read_cookie(headers: Headers) -> bytes | None:
    """The token in the login's cookie; None without the cookie, or if it cannot be read."""
    for part in headers.get(b"cookie", b"").split(b";"):
        name, _, value = part.strip(b" ").partition(b"=")
        if name == NAME:
            try:
                return base64.b64decode(value, altchars=b"-_", validate=True) or None
            except binascii.Error:
                return None
    return None


def set_cookie(token: bytes, *, secure: bool) -> bytes:
    """The value of Set-Cookie that logs in.

    It has no Path: the browser takes the folder of the login page, /ui, also where a proxy puts another folder before.
    SameSite is Lax, not Strict, so that a link from elsewhere to a page works; calls that change something are POST.
    """
    return _cookie(base64.b64encode(token, altchars=b"-_"), MAX_AGE, secure=secure)


def clear_cookie() -> bytes:
    """The value of Set-Cookie that logs out, from a page in the same folder as the login."""
    return _cookie(b"", 0, secure=False)


def _cookie(value: bytes, seconds: int, *, secure: bool) -> bytes:
    return b"%b=%b; Max-Age=%d; HttpOnly; SameSite=Lax%b" % (NAME, value, seconds, b"; Secure" if secure else b"")


def form_token(headers: Headers) -> str:
    """What a form has to send back, which only pages that can read ours know; empty without a login.

    Derived from the cookie's token, so nothing has to be stored.
    """
    token = read_cookie(headers)
    return "" if token is None else hmac.new(token, b"batchnorm form", hashlib.sha256).hexdigest()

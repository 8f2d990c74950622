"""Access control by bearer tokens: one for all calls, one for reads."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

from batchnorm_client.wire.errors import Forbidden, Unauthenticated

from .headers import Headers
from .target import Target

PUBLIC_PATHS: Final = frozenset(
    {
        "/",
        "/docs",
        "/docs/start.js",
        "/docs/swagger-ui-bundle.js",
        "/docs/swagger-ui.css",
        "/healthz",
        "/openapi.json",
        "/problems",
        "/readyz",
    }
)
"""Paths that need no token, normalized as in `Target.path`."""

PUBLIC_PARENTS: Final = ("/problems",)
"""Paths of one of these plus exactly one segment need no token either."""


def is_public(path: str) -> bool:
    """Whether a path needs no token even when one is configured. All unlisted paths need one."""
    if path in PUBLIC_PATHS:
        return True
    parent, _, last = path.rpartition("/")
    return last != "" and parent in PUBLIC_PARENTS


@dataclass(frozen=True, slots=True)
class Guard:
    """Check of the Authorization header, on all paths that are not public.

    Attributes:
        token: allows every call; None disables the check.
        read_token: allows GET, HEAD and eval.
    """

    token: str | None = field(default=None, repr=False)
    read_token: str | None = field(default=None, repr=False)

    def check(self, headers: Headers, method: str, target: Target) -> None:
        """Return if the call is allowed.

        Raises:
            Unauthenticated: the token is missing or unknown.
            Forbidden: it is the read token, and the call is not a read.
        """
        if self.token is None or (not target.versioned and is_public(target.path)):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        if scheme.lower() != b"bearer" or not given:
            raise Unauthenticated("this service asks for a token: Authorization: Bearer <token>", field="Authorization")
        if hmac.compare_digest(given, self.token.encode()):
            return
        if self.read_token is None or not hmac.compare_digest(given, self.read_token.encode()):
            raise Unauthenticated("the service does not know this token", field="Authorization")
        if method not in {"GET", "HEAD"} and not (method == "POST" and target.call == "eval"):
            raise Forbidden("a read token allows GET and eval only", field="Authorization")

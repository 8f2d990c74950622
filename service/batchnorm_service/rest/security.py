"""Who may do what: bearer tokens, one for everything and one for reading."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

from batchnorm_client.wire.errors import Forbidden, Unauthenticated

from .headers import Headers
from .target import Target

OPEN_PATHS: Final = frozenset(
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
"""Paths that need no token, as `Target.path` spells them. Whatever is not here or below needs one."""

OPEN_PARENTS: Final = ("/problems",)
"""Every path that is one of these and exactly one more segment needs no token either."""


def is_open(path: str) -> bool:
    """Whether a path needs no token even when one is configured. A path that nobody thought of needs one."""
    if path in OPEN_PATHS:
        return True
    parent, _, last = path.rpartition("/")
    return last != "" and parent in OPEN_PARENTS


@dataclass(frozen=True, slots=True)
class Guard:
    """Checks the Authorization header of every call whose path is not open.

    Attributes:
        token: allows everything; None leaves the service open.
        read_token: allows GET, HEAD and eval.
    """

    token: str | None = field(default=None, repr=False)
    read_token: str | None = field(default=None, repr=False)

    def check(self, headers: Headers, method: str, target: Target) -> None:
        """Let the call through, or not.

        Raises:
            Unauthenticated: no token, or one that the service does not know.
            Forbidden: the read token, and the call is more than reading.
        """
        if self.token is None or (not target.versioned and is_open(target.path)):
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

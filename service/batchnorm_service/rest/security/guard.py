"""Finds out who calls, by the header Authorization; under /ui also by the cookie of the login."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Final

from batchnorm_client.wire.errors import Unauthenticated
from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.tokens import EVERYTHING, MAX_TOKEN_BYTES, Grant, Scope, StoredToken, TokenFile, find_token

from ..headers import Headers
from ..target import Target, is_page
from .cookies import read_cookie
from .failures import Failures, WrongTokenError
from .rules import is_public

_MAX_KNOWN: Final = 1024


class Guard:
    """Check of the Authorization header, on all paths that are not public.

    Args:
        token: allows every call.
        read_token: allows calls that change nothing.
        file: more tokens, whose scopes and prefixes it says.
        closed: public paths that need a token all the same.
        runtime: clock and sleep.

    Attributes:
        failures: what was refused.
        enabled: whether there are tokens at all.
        closed: as above.
    """

    def __init__(
        self,
        token: str | None = None,
        read_token: str | None = None,
        file: TokenFile | None = None,
        *,
        closed: frozenset[str] = frozenset(),
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.failures = Failures(runtime)
        self.closed: Final = closed
        self._file = file
        self._read_from_file: Mapping[str, StoredToken] = {}
        # Tokens are compared by a digest under a random key: it costs less than the salted hashes of the file, and the
        # time of a look-up says nothing about a token to somebody who does not know the key.
        self._digest: Final = hashlib.blake2b(key=secrets.token_bytes(32), digest_size=16)
        self._fixed = [
            (self._digest_of(secret.encode()), Grant(scope))
            for secret, scope in ((token, Scope.ADMIN), (read_token, Scope.READ))
            if secret is not None
        ]
        self.enabled: Final = bool(self._fixed) or file is not None
        self._known: dict[bytes, Grant] = {}

    def authenticate(self, headers: Headers, target: Target) -> Grant | None:
        """What the caller may do; None for a public path, whoever calls.

        Raises:
            Unauthenticated: there is no token.
            WrongTokenError: there is one, but it is not valid.
        """
        if not self.enabled:
            return EVERYTHING
        if not target.versioned and is_public(target.path) and target.path not in self.closed:
            return None
        header = headers.get(b"authorization")
        if header is None and is_page(target.path) and (token := read_cookie(headers)) is not None:
            header = b"Bearer " + token
        if header is None:
            raise _missing()
        return self.grant(header)

    def grant(self, header: bytes) -> Grant:
        """What the token in the value of an Authorization header allows. Raises as `authenticate` does."""
        if self._file is not None and (tokens := self._file.current()) is not self._read_from_file:
            self._read_from_file = tokens
            self._known.clear()  # some may be revoked
        digest = self._digest_of(header)
        grant = self._known.get(digest)
        if grant is None:
            grant = self._verify(header)
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[digest] = grant
        return grant

    def _verify(self, header: bytes) -> Grant:
        scheme, _, presented = header.partition(b" ")
        presented = presented.strip(b" ")
        if scheme.lower() != b"bearer" or not presented:
            raise _missing()
        if len(presented) <= MAX_TOKEN_BYTES:
            digest = self._digest_of(presented)
            for fixed, grant in self._fixed:
                if hmac.compare_digest(fixed, digest):
                    return grant
            stored = find_token(self._read_from_file, presented)
            if stored is not None:
                return stored.grant
        raise WrongTokenError("the service does not know this token", field="Authorization")

    def _digest_of(self, data: bytes) -> bytes:
        digest = self._digest.copy()  # costs less than a new one with a key
        digest.update(data)
        return digest.digest()


def _missing() -> Unauthenticated:
    return Unauthenticated("this service asks for a token: Authorization: Bearer <token>", field="Authorization")

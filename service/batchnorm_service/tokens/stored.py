"""Tokens and their stored form: a line of text with a salted hash."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from batchnorm_client.wire.names import LAYER_NAME_PATTERN

from .grants import Grant, Scope

MAX_TOKEN_BYTES: Final = 4096
"""Longer tokens are refused without hashing them."""

MAX_FILE_BYTES: Final = 1 << 20
"""Larger files are refused; room for about 5,000 tokens."""

_HEADER: Final = "batchnorm-tokens 1"
_NO_PREFIX: Final = "*"
_TOKEN: Final = re.compile(rb"bns_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_LINE: Final = re.compile(r"([0-9a-f]{12}) (read|train|admin) (\S+) (\S+) ([0-9a-f]{32}) ([0-9a-f]{64})")
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"


class TokenFileError(Exception):
    """A token file cannot be used; the message names the file, the line and the reason."""


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token as it is stored: it can be recognized, but not recovered.

    Attributes:
        id: names the token; not secret.
        grant: what it allows.
        created: when it was made, in UTC, in whole seconds.
        salt: 16 random bytes.
        digest: 32 bytes: the hash of the salt and the token.
    """

    id: str
    grant: Grant
    created: datetime
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    def matches(self, token: bytes) -> bool:
        """Whether it is this token; compared in constant time."""
        return hmac.compare_digest(_hash(token, self.salt), self.digest)


_NOBODY: Final = StoredToken("", Grant(Scope.READ), datetime.min.replace(tzinfo=UTC), bytes(16), bytes(32))


def new_token(scope: Scope, prefix: str = "") -> tuple[str, StoredToken]:
    """A new random token, and its stored form."""
    token_id = secrets.token_hex(6)
    token = f"bns_{token_id}_{secrets.token_urlsafe(32)}"
    salt = secrets.token_bytes(16)
    created = datetime.now(UTC).replace(microsecond=0)
    return token, StoredToken(token_id, Grant(scope, prefix), created, salt, _hash(token.encode(), salt))


def find_token(tokens: Mapping[str, StoredToken], presented: bytes) -> StoredToken | None:
    """The stored token that `presented` is, or None.

    Computes one hash, however many tokens there are, because a token contains its id.
    """
    parts = _TOKEN.fullmatch(presented)
    stored = tokens.get(parts[1].decode(), _NOBODY) if parts else _NOBODY
    # An unknown id is hashed too, so that it takes as long as a known one.
    return stored if stored.matches(presented) and stored is not _NOBODY else None


def parse_tokens(data: bytes) -> dict[str, StoredToken]:
    """The tokens of a file, by id.

    Raises:
        TokenFileError: the data is not exactly what `format_tokens` writes; names the line.
    """
    if len(data) > MAX_FILE_BYTES:
        raise TokenFileError(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise _damaged(data.count(b"\n", 0, error.start) + 1, "is not ASCII") from None
    # Not `splitlines`, for which other characters end a line, too.
    lines = text.split("\n")
    if lines[0] != _HEADER:
        raise _damaged(1, f"must be {_HEADER!r}")
    if lines.pop():
        raise _damaged(len(lines) + 1, "is not complete")
    tokens: dict[str, StoredToken] = {}
    for number, line in enumerate(lines[1:], start=2):
        token = _parse_line(number, line)
        if token.id in tokens:
            raise _damaged(number, f"repeats the id {token.id}")
        tokens[token.id] = token
    return tokens


def format_tokens(tokens: Iterable[StoredToken]) -> bytes:
    """The content of a token file."""
    lines = [
        f"{token.id} {token.grant.scope} {token.grant.prefix or _NO_PREFIX} {token.created.strftime(_TIME)}"
        f" {token.salt.hex()} {token.digest.hex()}"
        for token in tokens
    ]
    return "".join(f"{line}\n" for line in (_HEADER, *lines)).encode()


def is_prefix(text: str) -> bool:
    """Whether a layer's name can start with this text."""
    return LAYER_NAME_PATTERN.fullmatch(text) is not None


def _parse_line(number: int, line: str) -> StoredToken:
    fields = _LINE.fullmatch(line)
    if fields is None:
        raise _damaged(number, "must be: id, read|train|admin, prefix or *, time, salt, hash")
    token_id, scope, prefix, created, salt, digest = fields.groups()
    if prefix == _NO_PREFIX:
        prefix = ""
    elif not is_prefix(prefix):
        raise _damaged(number, "has a prefix that no layer's name can have")
    try:
        time = datetime.strptime(created, _TIME).replace(tzinfo=UTC)
    except ValueError:
        time = None
    if time is None or time.strftime(_TIME) != created:
        raise _damaged(number, "has a time that is not like 2026-01-31T23:59:59Z")
    return StoredToken(token_id, Grant(Scope.parse(scope), prefix), time, bytes.fromhex(salt), bytes.fromhex(digest))


def _damaged(number: int, reason: str) -> TokenFileError:
    return TokenFileError(f"line {number} {reason}")


def _hash(token: bytes, salt: bytes) -> bytes:
    # One fast hash is enough: a token has 256 random bits, so nobody can try all of them. Slow hashes such as scrypt
    # are for passwords, which people choose.
    return hashlib.blake2b(token, salt=salt, digest_size=32).digest()

"""ETags of layers and of their states, and the preconditions If-Match and If-None-Match (RFC 9110, 13)."""

from __future__ import annotations

import re
from typing import Final

from batchnorm_client.wire.errors import InvalidRequest

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
IF_MATCH_PATTERN: Final = r'^(\*|(W/)?"[!#-~]*"(, *(W/)?"[!#-~]*")*)$'
"""For the OpenAPI document: `*` or a list of tags, without rarities of the grammar that `if_match` also takes."""
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_STRONG_TAG = re.compile(r'(?<!W/)"((?:0|[1-9][0-9]{0,18})(?:-[0-9a-f]{1,16})?|[0-9a-f]{32})"')
_ANY_VERSION = re.compile(r'"(0|[1-9][0-9]{0,18})"')


def etag(version: int) -> bytes:
    """The ETag of a version."""
    return b'"%d"' % version


def state_etag(tag: str) -> bytes:
    """The ETag of the state of one layer, or of several."""
    return b'"%b"' % tag.encode()


def if_match(header: str | None) -> frozenset[int | str] | None:
    """The versions and tags of states that satisfy an If-Match header; None if any does (no header, or `*`).

    RFC 9110, 13.1.1: a list of entity tags with strong comparison. Weak tags and tags that this service never issued
    match nothing. A malformed header is refused: ignoring it would drop the client's precondition, and treating it as
    false would hide the mistake. `*` requires an existing layer, which all calls with If-Match do anyway.

    Raises:
        InvalidRequest: it is neither `*` nor a list of entity tags.
    """
    if header is None or header.strip() == "*":
        return None
    if not _TAGS.fullmatch(header):
        raise InvalidRequest(
            'If-Match is * or a list of entity tags such as "7", quotes included',
            field="If-Match",
            expected='"<version>"',
            got=header[:200],
        )
    return frozenset(int(tag) if tag.isdigit() and len(tag) < 20 else tag for tag in _STRONG_TAG.findall(header))


def matches_none(header: bytes | None, version: int) -> bool:
    """Whether an If-None-Match header is satisfied; if not, the response is 304.

    RFC 9110, 13.1.2: weak comparison. A malformed header is ignored: the client then gets the full response.
    """
    if header is None:
        return True
    text = header.decode("latin-1")
    if text.strip() == "*":
        return False
    return not (_TAGS.fullmatch(text) and str(version) in _ANY_VERSION.findall(text))


def known_tags(header: bytes | None) -> frozenset[str] | None:
    """The tags in an If-None-Match header, `*` for any; None if there is no header, or a malformed one.

    A state is known by its ETag, or, as that of one layer, by its version.
    """
    if header is None:
        return None
    text = header.decode("latin-1").strip()
    if text == "*":
        return frozenset("*")
    return frozenset(tag[tag.index('"') + 1 : -1] for tag in re.findall(_TAG, text)) if _TAGS.fullmatch(text) else None

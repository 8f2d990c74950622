"""Entity tags: a layer's version as its ETag, and the conditions If-Match and If-None-Match."""

from __future__ import annotations

import re

from batchnorm_client.wire.errors import InvalidRequest

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_STRONG_VERSION = re.compile(r'(?<!W/)"(0|[1-9][0-9]{0,18})"')
_ANY_VERSION = re.compile(r'"(0|[1-9][0-9]{0,18})"')


def etag(version: int) -> bytes:
    """The ETag of that version."""
    return b'"%d"' % version


def if_match(given: str | None) -> frozenset[int] | None:
    """The versions that an If-Match header admits; None when it admits any (absent, or `*`).

    RFC 9110, 13.1.1: a list of tags under the strong comparison, so weak tags match nothing; neither do tags that this
    service never gave. A header that is no such list is refused: to ignore it would drop the caller's condition, and
    to take it as never true would hide the mistake. `*` asks for a layer that exists, which every call does by itself.

    Raises:
        InvalidRequest: it is neither `*` nor a list of entity tags.
    """
    if given is None or given.strip() == "*":
        return None
    if not _TAGS.fullmatch(given):
        raise InvalidRequest(
            'If-Match is * or a list of entity tags such as "7", quotes included',
            field="If-Match",
            expected='"<version>"',
            got=given[:200],
        )
    return frozenset(int(version) for version in _STRONG_VERSION.findall(given))


def matches_none(given: bytes | None, version: int) -> bool:
    """Whether an If-None-Match header lets the response through: False means 304.

    RFC 9110, 13.1.2: the weak comparison. A header that is no list of tags is ignored; that costs a response in full.
    """
    if given is None:
        return True
    text = given.decode("latin-1")
    if text.strip() == "*":
        return False
    return not (_TAGS.fullmatch(text) and str(version) in _ANY_VERSION.findall(text))

"""Entity tags: a layer's version as its ETag, and the conditions If-Match and If-None-Match."""

from __future__ import annotations

import re

from batchnorm_client.wire.errors import InvalidRequest

from .headers import Headers

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_STRONG_VERSION = re.compile(r'(?<!W/)"(0|[1-9][0-9]{0,18})"')
_ANY_VERSION = re.compile(r'"(0|[1-9][0-9]{0,18})"')


def etag(version: int) -> bytes:
    """The ETag of that version."""
    return b'"%d"' % version


def if_match(headers: Headers) -> frozenset[int] | None:
    """The versions that If-Match admits; None when it admits any (absent, or `*`).

    RFC 9110, 13.1.1: a list of tags under the strong comparison, so weak tags match nothing; neither do tags that this
    service never gave. A header that is no such list is refused: to ignore it would drop the caller's condition, and
    to take it as never true would hide the mistake. `*` asks for a layer that exists, which every call does by itself.

    Raises:
        InvalidRequest: it is neither `*` nor a list of entity tags.
    """
    given = headers.get(b"if-match")
    if given is None or given.strip() == b"*":
        return None
    text = given.decode("latin-1")
    if not _TAGS.fullmatch(text):
        raise InvalidRequest(
            'If-Match is * or a list of entity tags such as "7", quotes included',
            field="If-Match",
            expected='"<version>"',
            got=text[:200],
        )
    return frozenset(int(version) for version in _STRONG_VERSION.findall(text))


def none_match_holds(headers: Headers, version: int) -> bool:
    """Whether If-None-Match lets the answer through: False means 304.

    RFC 9110, 13.1.2: the weak comparison. A header that is no list of tags is ignored; that costs an answer in full.
    """
    given = headers.get(b"if-none-match")
    if given is None:
        return True
    text = given.decode("latin-1")
    if text.strip() == "*":
        return False
    return not (_TAGS.fullmatch(text) and str(version) in _ANY_VERSION.findall(text))

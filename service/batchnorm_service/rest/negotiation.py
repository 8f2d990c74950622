"""Content negotiation (RFC 9110, 12): the media types of request (Content-Type) and response (Accept)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from batchnorm_client.wire.errors import NotAcceptable, UnsupportedMediaType
from batchnorm_client.wire.tensors import CODECS

from .headers import Headers

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110's word, not a secret
_RANGE = re.compile(rf"\s*({_TOKEN})/({_TOKEN})\s*")
_QUALITY = re.compile(r"\s*q=(0?\.[0-9]{1,3}|0\.?|1(\.0{0,3})?)\s*", re.IGNORECASE)

_MAX_CACHED_BYTES: Final = 256
"""Longer headers are not cached: clients choose them, and the cache must be bounded in bytes."""

_MAX_RANGES: Final = 100
"""Further elements of Accept are ignored: 60,000 of them took 0.1 s of the event loop."""

FORMS_FOR = {media: (media, *(m for m in CODECS if m != media)) for media in CODECS}
"""Media types of responses to train and eval, by the request's media type, which comes first as the default."""


def content_type(headers: Headers, known: tuple[str, ...]) -> str:
    """The media type of the body, one of `known`. Parameters other than charset are ignored.

    Raises:
        UnsupportedMediaType: it is unknown or missing, its charset is not UTF-8, or the body is compressed.
    """
    encoding, given = headers.get(b"content-encoding", b""), headers.get(b"content-type", b"")
    if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":  # the parser accepts `gzip, chunked`
        raise UnsupportedMediaType(
            "the service reads no compressed bodies", field="Transfer-Encoding", expected=["chunked"]
        )
    find = _content_type if len(encoding) + len(given) <= _MAX_CACHED_BYTES else _content_type.__wrapped__
    return find(encoding, given, known)


@lru_cache(maxsize=256)
def _content_type(encoding: bytes, given: bytes, known: tuple[str, ...]) -> str:
    if encoding.strip().lower() not in {b"identity", b""}:
        raise UnsupportedMediaType(
            "the service reads no compressed bodies", field="Content-Encoding", expected=["identity"]
        )
    media, charset = _media_type(given)
    if media not in known:
        detail = f"the body is {media!r}" if media else "the body has no Content-Type"
        raise UnsupportedMediaType(
            f"{detail}; here the service reads {', '.join(known)}",
            field="Content-Type",
            expected=list(known),
            got=media,
        )
    if charset not in {"", "utf-8", "utf8"}:
        raise UnsupportedMediaType(
            f"the charset is {charset!r}; the service reads UTF-8 only",
            field="Content-Type",
            expected=["utf-8"],
            got=charset,
        )
    return media


def _media_type(value: bytes) -> tuple[str, str]:
    media, *parameters = value.decode("latin-1").lower().split(";")
    charset = ""
    for parameter in parameters:
        name, _, text = parameter.partition("=")
        if name.strip() == "charset":
            charset = text.strip().strip('"')
    return media.strip(), charset


def accepted(header: bytes | None, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The media types of `offered` that the client accepts, best first.

    At equal q, a media type that is named precedes one matched by a wildcard. A wildcard matches only the first of
    `offered` that is not named (the default), so that `*/*` never selects a media type that the client may not expect.
    Elements that cannot be parsed are skipped; if none can be parsed, Accept is ignored.

    Raises:
        NotAcceptable: the client accepts none of them.
    """
    find = _accepted if header is None or len(header) <= _MAX_CACHED_BYTES else _accepted.__wrapped__
    return find(header, offered)


@lru_cache(maxsize=256)
def _accepted(header: bytes | None, offered: tuple[str, ...]) -> tuple[str, ...]:
    ranges = _ranges(header)
    if not ranges:
        return offered[:1]
    found: list[tuple[float, int, str]] = []
    unnamed = [form for form in offered if form not in ranges]
    for media, quality in ranges.items():
        if media in offered:
            found.append((quality, 1, media))
    wildcard = ranges.get("application/*", ranges.get("*/*"))
    if wildcard is not None and unnamed:
        found.append((wildcard, 0, unnamed[0]))
    found.sort(key=lambda item: (-item[0], -item[1], offered.index(item[2])))
    forms = tuple(form for quality, _, form in found if quality > 0)
    if not forms:
        raise NotAcceptable(f"the response can be {', '.join(offered)}", field="Accept", expected=list(offered))
    return forms


def _ranges(header: bytes | None) -> dict[str, float]:
    ranges: dict[str, float] = {}
    for element in (header or b"").decode("latin-1").split(",", _MAX_RANGES)[:_MAX_RANGES]:
        media, *parameters = element.split(";")
        quality = 1.0
        parsed = _RANGE.fullmatch(media)
        for parameter in parameters:
            if parameter.strip().lower().startswith("q="):
                match = _QUALITY.fullmatch(parameter)
                parsed = parsed if match else None
                quality = float(match[1]) if match else 0.0
        if parsed:
            ranges[f"{parsed[1]}/{parsed[2]}".lower()] = quality
    return ranges


def tensor_form(forms: Sequence[str], dtype: str, statistics: bool) -> str:
    """The first of `forms` (media types) that can carry the dtype and, with statistics, several tensors.

    Raises:
        NotAcceptable: none of them can.
    """
    for form in forms:
        if _carries(form, dtype, statistics):
            return form
    why = "carries one tensor, and statistics are several" if statistics else f"has no {dtype}"
    raise NotAcceptable(
        f"{forms[0]} {why}; name another form in Accept",
        field="Accept",
        expected=[form for form in CODECS if _carries(form, dtype, statistics)],
        got=forms[0],
    )


def _carries(form: str, dtype: str, several: bool) -> bool:
    row = CODECS[form]
    return dtype in row.dtypes and (row.several or not several)

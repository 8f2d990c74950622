"""The caller's place in a trace: the headers `traceparent` and `tracestate` of the W3C recommendation Trace Context."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_VERSION: Final = b"00"
_INVALID_VERSION: Final = b"ff"


class TraceContext(NamedTuple):
    """What a request says about the trace that it belongs to.

    Attributes:
        trace_id: 128 bits, not 0.
        span_id: of the caller's span: 64 bits, not 0.
        sampled: whether the caller exports its span.
        state: of the systems that traced it before, as it came; not checked.
    """

    trace_id: int
    span_id: int
    sampled: bool
    state: str


def read_trace_context(headers: Mapping[bytes, bytes]) -> TraceContext | None:
    """The trace context of a request; None if there is none, or it is malformed: then a new trace begins (W3C, 3.2).

    Args:
        headers: by lower-case name; the values of a repeated header are joined by commas, so a second `traceparent`
            makes both invalid.
    """
    given = headers.get(b"traceparent")
    found = None if given is None else _TRACEPARENT.fullmatch(given)
    if found is None:
        return None
    version, trace, span, flags, rest = found.groups()
    if version == _INVALID_VERSION or (version == _VERSION and rest is not None):
        return None
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id:
        return None
    state = headers.get(b"tracestate", b"").decode("latin-1")
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1), state)

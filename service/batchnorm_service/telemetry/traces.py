"""Traces: a span for each request that is sampled, and one for each of its stages.

Spans are recorded here and converted by an `Exporter` (`telemetry/otel.py`). OpenTelemetry's own spans take 20 us each,
ten times as long, mostly for checks and locks that these do not need: a span is used by one coroutine, and its
attributes are ours.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Final, Literal, Protocol, Self

from batchnorm_client.wire.errors import ProblemError

from .budget import Budget
from .trace_context import TraceContext, read_trace_context

Attributes = dict[str, str | int | float | bool]
Kind = Literal["server", "internal"]

TRACES_PER_SECOND: Final = 10
"""How many traces a process begins in a second unless OTEL_TRACES_SAMPLER says something else."""

MAX_LINKS: Final = 128
"""OpenTelemetry's default limit for the links of a span."""

ERROR_TYPE: Final = "error.type"


class TracesRefusedError(Exception):
    """Traces cannot be exported as the environment says; the message says why."""


class Exporter(Protocol):
    """Where spans go."""

    def samples(self, parent: TraceContext | None, trace_id: int, name: str) -> bool:
        """Whether the sampler that is configured chooses this trace."""
        ...

    def export(self, span: Span, ended: int) -> None:
        """Export a span that ended at this time, by `time.time_ns`. Must not block."""
        ...

    def close(self) -> None:
        """Send what is left. May block."""
        ...


class Span:
    """A part of the work for a request, and when it happened. A context manager.

    Attributes:
        name: of the request's route, or of the stage.
        trace_id, span_id: random.
        parent: the span id of the caller or of the span around it; None for the first span of a trace.
        remote: whether the parent is a span of another process.
        state: the trace's `tracestate`.
        kind: `server` for the span of a request.
        began: by `time.perf_counter_ns`.
        attributes: what is known about it. Never a tensor's values or a token.
        failed: whether it failed, other than by what the caller sent.
        links: related spans of other traces.
    """

    __slots__ = (
        *("_exporter", "attributes", "began", "failed", "kind", "links", "name", "parent", "remote", "span_id"),
        *("state", "trace_id"),
    )

    def __init__(
        self, exporter: Exporter, name: str, trace_id: int, parent: int | None, *, state: str = "", kind: Kind
    ) -> None:
        self._exporter = exporter
        self.name = name
        self.trace_id = trace_id
        self.span_id = _random_id(64)
        self.parent = parent
        self.remote = kind == "server" and parent is not None
        self.state = state
        self.kind: Kind = kind
        self.began = time.perf_counter_ns()
        self.attributes: Attributes = {}
        self.failed = False
        self.links: list[Span] = []

    def child(self, name: str) -> Span:
        """A span inside this one."""
        return Span(self._exporter, name, self.trace_id, self.span_id, state=self.state, kind="internal")

    def end(self) -> None:
        """Export it; it has ended now."""
        self._exporter.export(self, time.time_ns())

    def __enter__(self) -> Self:
        self.began = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.attributes[ERROR_TYPE] = error.name if isinstance(error, ProblemError) else type(error).__name__
            self.failed = not isinstance(error, ProblemError) or error.status >= 500
        self.end()


CURRENT_SPAN: Final[ContextVar[Span | None]] = ContextVar("CURRENT_SPAN", default=None)
"""The span around the code that runs; None if the request is not sampled."""


class Traces:
    """Decides which requests are sampled, and begins their traces.

    Args:
        exporter: where spans go.
        per_second: how many traces may begin in a second, besides those that callers began: then no other sampler is
            asked. None to ask the exporter.
        parent_decides: whether a request whose caller does not sample it is never sampled.
    """

    def __init__(
        self, exporter: Exporter, per_second: int | None = TRACES_PER_SECOND, *, parent_decides: bool = True
    ) -> None:
        self._exporter = exporter
        self._budget = None if per_second is None else Budget(per_second)
        self._parent_decides = parent_decides

    def begin(self, headers: Mapping[bytes, bytes], method: str) -> Span | None:
        """The span of a request, or None if it is not sampled."""
        parent = None
        if b"traceparent" in headers and (parent := read_trace_context(headers)) is not None:
            if not parent.sampled and self._parent_decides:
                return None
        elif self._budget is not None and not self._budget.take():
            return None
        trace_id = _random_id(128) if parent is None else parent.trace_id
        if self._budget is None and not self._exporter.samples(parent, trace_id, method):
            return None
        span_id, state = (None, "") if parent is None else (parent.span_id, parent.state)
        return Span(self._exporter, method, trace_id, span_id, state=state, kind="server")

    def close(self) -> None:
        """Send what is left. May block."""
        self._exporter.close()


@contextmanager
def commit_span(waiting: Sequence[Span], attributes: Attributes) -> Iterator[Span | None]:
    """A span of a commit that several calls wait for, each with a link to the other; None if none of them is sampled.

    Args:
        waiting: the spans of these calls. The commit belongs to the trace of the first.
        attributes: of the commit.
    """
    if not waiting:
        yield None
        return
    with waiting[0].child("commit") as span:
        span.attributes = attributes
        span.links = list(waiting[:MAX_LINKS])
        for other in waiting[1:]:
            other.links.append(span)
        yield span


def _random_id(bits: int) -> int:
    """Need not be secret; 0 is no valid id."""
    return random.getrandbits(bits) or 1

"""Reports every response to the metrics, the log and the traces, whichever way its request came."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from batchnorm_service.telemetry import Metrics, RequestLog, Span, Traces
from batchnorm_service.telemetry.metrics import LABELS, OTHER
from batchnorm_service.telemetry.requests import RequestMetrics, RouteMetrics
from batchnorm_service.telemetry.trace_context import read_trace_context
from batchnorm_service.telemetry.traces import ERROR_TYPE

from .headers import Headers
from .target import Target

_UNTRACED: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""What monitoring asks all the time."""


class Served(NamedTuple):
    """A request, and the response that is about to be sent.

    Attributes:
        method: of the request.
        target: of the request; None if it was refused before it was parsed.
        headers: of the request.
        request_id: the response's X-Request-ID.
        status: of the response; 0 if the client left before it.
        outcome: one of `OUTCOMES`.
        seconds: since the request was complete.
        received, sent: bytes of the two bodies.
    """

    method: str
    target: Target | None
    headers: Headers
    request_id: str
    status: int
    outcome: str
    seconds: float
    received: int
    sent: int


class RequestReports:
    """What the gateway reports to.

    Args:
        metrics: None if they are off.
        log: writes requests.
        traces: None if they are off.
        endpoints: by method and path's template.
        route_of: the template of any other path.

    Attributes:
        log, traces: as above.
        endpoints: what their requests are reported to, by method and path's template; empty if metrics are off.
    """

    def __init__(
        self,
        metrics: Metrics | None,
        log: RequestLog,
        traces: Traces | None,
        endpoints: Iterable[tuple[str, str]],
        route_of: Callable[[str], str],
    ) -> None:
        self.log = log
        self.traces = traces
        self._requests = RequestMetrics(metrics) if metrics else None
        self._route_of = route_of
        self._known = frozenset(endpoints)
        self.endpoints: dict[tuple[str, str], RouteMetrics] = {}
        if self._requests:
            for method, call in self._known:
                self.endpoints[method, call] = self._requests.of(method, call)

    def begin(self, method: str, target: Target, headers: Headers) -> Span | None:
        """The span of a request that begins; None if it is not sampled."""
        if self.traces is None or target.path in _UNTRACED:
            return None
        return self.traces.begin(headers, method)

    def report(self, served: Served, span: Span | None = None) -> None:
        """Report a response that is about to be sent, and end the request's span."""
        if self._requests is not None:
            target = served.target
            route = self.endpoints.get((served.method, target.call)) if target is not None and target.call else None
            if route is None:
                route = self._requests.of(served.method, self._template(served))
            route.report(served.outcome, served.seconds, served.received, served.sent)
        if span is not None or self.log.wants(served.status, served.seconds):
            self.describe(served, span)

    def describe(self, served: Served, span: Span | None) -> None:
        """Write a request to the log, if that wants it, and end its span."""
        route, target = self._template(served), served.target
        layer = target.layer if target is not None and target.named else None
        if span is not None:
            _end(span, served, route, layer)
        if self.log.wants(served.status, served.seconds):
            traced = span or read_trace_context(served.headers)
            self.log.write(
                served.status,
                served.seconds,
                request_id=served.request_id,
                trace_id=None if traced is None else f"{traced.trace_id:032x}",
                span_id=None if span is None else f"{span.span_id:016x}",
                method=served.method,
                route=route,
                layer=layer,
                outcome=served.outcome,
                bytes_received=served.received,
                bytes_sent=served.sent,
            )

    def _template(self, served: Served) -> str:
        target = served.target
        if target is None:
            return OTHER
        known = target.call and (served.method, target.call) in self._known
        return target.call if known else self._route_of(target.path)


def _end(span: Span, served: Served, route: str, layer: str | None) -> None:
    """End the span of a request, named and described as OpenTelemetry's conventions for HTTP say."""
    method = served.method if served.method in LABELS["method"] else "_OTHER"
    span.name = "HTTP" if method == "_OTHER" else method
    if route != OTHER:
        span.name += f" {route}"
        span.attributes["http.route"] = route
    span.attributes |= {
        "http.request.method": method,
        "http.request.body.size": served.received,
        "http.response.body.size": served.sent,
        "batchnorm.outcome": served.outcome,
        "batchnorm.request_id": served.request_id,
    }
    if layer is not None:
        span.attributes["batchnorm.layer"] = layer
    if served.status:
        span.attributes["http.response.status_code"] = served.status
    if served.status >= 500:
        span.attributes[ERROR_TYPE] = served.outcome
        span.failed = True
    span.end()

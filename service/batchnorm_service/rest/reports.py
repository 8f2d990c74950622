"""Reports every response to the metrics, whichever way its request came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from batchnorm_service.telemetry import Metrics
from batchnorm_service.telemetry.metrics import OTHER
from batchnorm_service.telemetry.requests import RequestMetrics, RouteMetrics

from .target import Target


class RequestReports:
    """What the gateway reports to.

    Args:
        metrics: None if they are off.
        endpoints: by method and last segment of `/v1/layers/{name}/...`, or another path.
        route_of: the template of any other path.

    Attributes:
        posts: of the fast path, by the last segment; empty if metrics are off.
    """

    def __init__(
        self, metrics: Metrics | None, endpoints: Iterable[tuple[str, str]], route_of: Callable[[str], str]
    ) -> None:
        self._requests = RequestMetrics(metrics) if metrics else None
        self._route_of = route_of
        self._endpoints: dict[tuple[str, str], RouteMetrics] = {}
        self.posts: dict[str, RouteMetrics] = {}
        if self._requests:
            for method, call in endpoints:
                path = call if call.startswith("/") else "/v1/layers/{name}" + (call and f"/{call}")
                route = self._requests.of(method, path)
                self._endpoints[method, call] = route
                if method == "POST":
                    self.posts[call] = route

    def report(self, method: str, target: Target | None, outcome: str, began: float, received: int, sent: int) -> None:
        """Report a response that is about to be sent.

        Args:
            method: of the request.
            target: of the request; None if it was refused before it was parsed.
            outcome: one of `OUTCOMES`.
            began: when the request was complete, by `time.perf_counter`.
            received: bytes of the request's body.
            sent: bytes of the response's body.
        """
        if self._requests is None:
            return
        call = None if target is None else target.call if target.layer else target.path
        route = None if call is None else self._endpoints.get((method, call))
        if route is None:
            route = self._requests.of(method, OTHER if target is None else self._route_of(target.path))
        route.report(outcome, time.perf_counter() - began, received, sent)

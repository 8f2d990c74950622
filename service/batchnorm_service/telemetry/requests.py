"""One report per request, whichever way it came."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from batchnorm_service.telemetry.metrics import OTHER, REQUEST_BYTES, REQUEST_SECONDS, RESPONSE_BYTES, SUCCESS
from batchnorm_service.telemetry.registry import Metrics

_BOUNDS: Final = REQUEST_SECONDS.buckets


class RequestMetrics:
    """Counts requests, their times and sizes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._routes: dict[tuple[str, str], RouteMetrics] = {}

    def of(self, method: str, route: str) -> RouteMetrics:
        """What the requests with this method and this path's template are reported to; unknown ones are `other`."""
        if (known := self._routes.get((method, route))) is not None:
            return known
        # Methods are chosen by clients: only those of the table become keys.
        method, route = self._metrics.known("method", method, OTHER), self._metrics.known("route", route, OTHER)
        return self._routes.setdefault((method, route), RouteMetrics(self._metrics, method, route))


class RouteMetrics(dict[str | None, tuple[int, int, int]]):
    """Counts the requests of one route. A dict of the places of its series by outcome, which a report looks up."""

    __slots__ = ("_labels", "_metrics", "_values")

    def __init__(self, metrics: Metrics, method: str, route: str) -> None:
        super().__init__()
        self._metrics = metrics
        self._labels = method, route
        self._values = metrics.values

    def report(self, outcome: str | None, seconds: float, received: int, sent: int) -> None:
        """Report a request whose response is about to be sent.

        As `Counter` and `Histogram` do, but written out: this is done for each request, and calling them takes longer.

        Args:
            outcome: one of `OUTCOMES`; None for `2xx`.
            seconds: from the end of the request to the response.
            received: bytes of its body.
            sent: bytes of the response's body.
        """
        times, bytes_in, bytes_out = self[outcome]
        values = self._values
        values[times] += seconds
        values[times + 1 + bisect_left(_BOUNDS, seconds)] += 1.0
        values[bytes_in] += received
        values[bytes_out] += sent

    def __missing__(self, outcome: str | None) -> tuple[int, int, int]:
        labels = *self._labels, outcome or SUCCESS
        place = self._metrics.place
        places = place(REQUEST_SECONDS, *labels), place(REQUEST_BYTES, *labels), place(RESPONSE_BYTES, *labels)
        self[outcome] = places
        return places

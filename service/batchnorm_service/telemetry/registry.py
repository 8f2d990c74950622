"""`Metrics`: hands out what reports to the metrics, and reads them for Prometheus.

All reports come from the thread of the event loop; each is an addition to a float64. prometheus_client's own counters
and histograms take three to eight times as long, since they lock and, with several processes, pack bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from batchnorm_service.telemetry.layout import Labels, Layout
from batchnorm_service.telemetry.metrics import LABELS, METRICS, WORKER_STARTS, WORKERS, Metric
from batchnorm_service.telemetry.values import Values

Read = Callable[[], float]


class Counter:
    """Reports to one series of a counter."""

    __slots__ = ("_index", "_values")

    def __init__(self, values: memoryview[float], index: int) -> None:
        self._values = values
        self._index = index

    def add(self, amount: float = 1.0) -> None:
        """Count."""
        self._values[self._index] += amount


class Histogram:
    """Reports to one series of a histogram, whose numbers `Layout` describes."""

    __slots__ = ("_bounds", "_first", "_index", "_values")

    def __init__(self, values: memoryview[float], index: int, bounds: Sequence[float]) -> None:
        self._values = values
        self._index = index
        self._first = index + 1
        self._bounds = bounds

    def observe(self, value: float) -> None:
        """Count a value in its bucket, whose upper bound is included, and add it to the sum."""
        values = self._values
        values[self._index] += value
        values[self._first + bisect_left(self._bounds, value)] += 1.0


class Reporter(Protocol):
    """Hands out what reports to a series; ask once, not for each report."""

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """The counter of these label values."""
        ...

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """The histogram of these label values."""
        ...

    def gauge(self, metric: Metric, read: Read) -> None:
        """Read a gauge by this function, when Prometheus asks."""
        ...


class Metrics(Collector):
    """The metrics of the service.

    Args:
        values: the values of labels which `LABELS` does not have: `route`, and those of the build.
        directory: what the processes of the service share; None if there is one only.

    Attributes:
        values: the numbers of this process.
    """

    def __init__(self, values: Mapping[str, Sequence[str]], directory: Path | None = None) -> None:
        self._labels = {**LABELS, **values}
        self._layout = Layout(self._labels)
        self._rows = Values(self._layout.size, directory)
        self.values: Final = self._rows.own
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._gauges: dict[Metric, Read] = {}
        self.gauge(WORKERS, lambda: 1)
        self.counter(WORKER_STARTS).add()
        self.read_gauges()

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """See `Reporter`. Raises `KeyError` for a label value that is not in the table."""
        return Counter(self.values, self.place(metric, *labels))

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """See `Reporter`. Raises `KeyError` for a label value that is not in the table."""
        return Histogram(self.values, self.place(metric, *labels), metric.buckets)

    def place(self, metric: Metric, *labels: str) -> int:
        """The index in `values` of the first number of a series; see `Layout`."""
        return self._layout.place(metric, labels)

    def gauge(self, metric: Metric, read: Read) -> None:
        """See `Reporter`."""
        self._gauges[metric] = read

    def known(self, label: str, value: str, otherwise: str) -> str:
        """The value, if the label can have it."""
        return value if value in self._labels[label] else otherwise

    def read_gauges(self) -> None:
        """Write the gauges of this process, for itself and the others. To be called in the event loop's thread."""
        for metric in METRICS:
            if metric.kind == "gauge":
                read = self._gauges.get(metric)
                self.values[self.place(metric)] = read() if read else 0.0

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all processes in Prometheus's text format or as OpenMetrics, and the media type.

        `accept` must be valid: prometheus_client raises all kinds of errors for versions that are none.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def collect(self) -> Iterator[Family]:
        """The metrics of all processes; gauges only of those that live."""
        rows = list(self._rows.rows())
        every = np.sum([np.asarray(row) for row, _ in rows], axis=0)
        living = np.sum([np.asarray(row) for row, lives in rows if lives], axis=0)
        for metric in METRICS:
            yield _family(metric, self._layout.used(metric, living if metric.kind == "gauge" else every))


def _family(metric: Metric, series: Iterable[tuple[Labels, Sequence[float]]]) -> Family:
    name, text, labels = metric.name, metric.help, metric.labels
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, text, labels=labels)
        bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
        for each, (observed, *counts) in series:
            histogram.add_metric(each, list(zip(bounds, accumulate(counts), strict=True)), observed)
        return histogram
    family = {"counter": CounterMetricFamily}.get(metric.kind, GaugeMetricFamily)(name, text, labels=labels)
    for each, numbers in series:
        value = 1.0 if metric.kind == "info" else sum(numbers[1:]) if metric.counts else numbers[0]
        family.add_metric(each, value)
    return family


class _NoCounter(Counter):
    def __init__(self) -> None:
        pass

    def add(self, amount: float = 1.0) -> None:
        pass


class _NoHistogram(Histogram):
    def __init__(self) -> None:
        pass

    def observe(self, value: float) -> None:
        pass


class NoMetrics:
    """A `Reporter` for when metrics are off."""

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """See `Reporter`."""
        return _NO_COUNTER

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """See `Reporter`."""
        return _NO_HISTOGRAM

    def gauge(self, metric: Metric, read: Read) -> None:
        """See `Reporter`."""


_NO_COUNTER: Final = _NoCounter()
_NO_HISTOGRAM: Final = _NoHistogram()

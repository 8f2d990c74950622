"""Where the numbers of each series are in a row of float64: every series that can exist has its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from batchnorm_service.telemetry.metrics import METRICS, Metric

Labels = tuple[str, ...]


class Layout:
    """Places of all series.

    A histogram has its sum, then the counts of its buckets, not cumulative, +Inf last; any other series one number.

    Args:
        labels: the values of each label.

    Attributes:
        size: how many numbers there are.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]]) -> None:
        self.size = 0
        self._series: dict[Metric, list[Labels]] = {}
        self._places: dict[Metric, dict[Labels, int]] = {}
        for metric in METRICS:
            self._series[metric] = series = list(product(*(labels[label] for label in metric.labels)))
            if metric.counts:
                self._places[metric] = self._places[metric.counts]
                continue
            self._places[metric] = {each: self.size + n * _width(metric) for n, each in enumerate(series)}
            self.size += _width(metric) * len(series)

    def place(self, metric: Metric, labels: Labels) -> int:
        """The index of the first number of a series. Raises `KeyError` for a label value that is not in the table."""
        return self._places[metric][labels]

    def used(self, metric: Metric, values: NDArray[np.float64]) -> list[tuple[Labels, list[float]]]:
        """The series of a metric, and their numbers. Those with labels only if reported: most never are."""
        series, width = self._series[metric], _width(metric.counts or metric)
        first = self._places[metric][series[0]]
        numbers = values[first : first + width * len(series)].reshape(-1, width)
        if not metric.labels or metric.kind == "info":
            return list(zip(series, numbers.tolist(), strict=True))
        return [(series[n], numbers[n].tolist()) for n in np.flatnonzero(numbers.any(axis=1))]


def _width(metric: Metric) -> int:
    return len(metric.buckets) + 2 if metric.kind == "histogram" else 1

"""The service's figures for people: what `/metrics` says, summed up by route and by operation of the store."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

_PREFIX: Final = "batchnorm_"
_SAMPLE: Final = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')
_LABEL: Final = re.compile(r'([a-z]+)="((?:[^"\\]|\\.)*)"')
_PARTS: Final = frozenset({"bucket", "sum", "count"})

GAUGES: Final = (
    *("running_calls", "queued_updates", "waiting_calls", "waiting_in_groups", "buffered_bytes"),
    *("resident_layers", "workers"),
)
COUNTERS: Final = (
    *("requests_total", "folds_total", "commits_total", "conflicts_total", "receipts_total"),
    *("request_bytes_total", "response_bytes_total", "cache_lookups_total"),
)
"""Names of gauges and counters, without the prefix; a counter is summed over its labels."""

_FAULTS: Final = frozenset({"5xx", "internal-error", "not-implemented", "group-incomplete"})
_BUSY: Final = frozenset({"overloaded", "store-unavailable"})
_FINE: Final = frozenset({"2xx", "3xx"})


@dataclass(slots=True)
class Times:
    """How long calls took.

    Attributes:
        name: a method and a route, or an operation of the store.
        refused: responses with 4xx, and callers who had disconnected.
        failed: responses with 5xx; errors of the store.
        seconds: in all.
        counts: calls by bucket, not cumulative; bucket i has those up to `bounds[i]`, the last one those above.
        bounds: upper bounds of the buckets in seconds, ascending.
    """

    name: str
    refused: float = 0.0
    failed: float = 0.0
    seconds: float = 0.0
    counts: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)

    @property
    def calls(self) -> float:
        """How many calls there were."""
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """About how many seconds the fraction `q` of the calls took at most; None without calls.

        As Prometheus's histogram_quantile: linear within a bucket, and the last bound for what is above it.
        """
        rank = q * self.calls
        if not self.calls:
            return None
        passed, low = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if passed + count >= rank and count:
                return low + (bound - low) * (rank - passed) / count
            passed, low = passed + count, bound
        return low

    def since(self, before: Times | None) -> Times:
        """The calls since an earlier reading of the same service."""
        if before is None or before.bounds != self.bounds:  # a release with other buckets
            return self
        counts = [now - then for now, then in zip(self.counts, before.counts, strict=True)]
        refused, failed = self.refused - before.refused, self.failed - before.failed
        return Times(self.name, refused, failed, self.seconds - before.seconds, counts, self.bounds)


@dataclass(slots=True)
class Figures:
    """A reading of the service's metrics.

    Attributes:
        gauges: as they are now.
        counters: since the service started.
        routes: requests by method and route, those with the most calls first.
        store: operations of the store, likewise.
    """

    gauges: dict[str, float]
    counters: dict[str, float]
    routes: list[Times]
    store: list[Times]

    def since(self, before: Figures) -> Figures:
        """What happened since an earlier reading; the gauges stay as they are now."""
        counters = {name: value - before.counters[name] for name, value in self.counters.items()}
        return Figures(self.gauges, counters, _since(self.routes, before.routes), _since(self.store, before.store))

    @property
    def restarted(self) -> bool:
        """Whether a difference has a counter that went down: the service was restarted in between."""
        return any(value < 0 for value in self.counters.values())


def _since(now: Iterable[Times], before: Iterable[Times]) -> list[Times]:
    known = {times.name: times for times in before}
    return _by_calls(times.since(known.get(times.name)) for times in now)


def _by_calls(times: Iterable[Times]) -> list[Times]:
    return sorted(times, key=lambda each: (-each.calls, each.name))


def together(name: str, times: Iterable[Times]) -> Times:
    """The calls of several routes as one."""
    whole = Times(name)
    for each in times:
        whole.bounds = each.bounds
        whole.counts = [a + b for a, b in zip(whole.counts or [0.0] * len(each.counts), each.counts, strict=True)]
        whole.refused += each.refused
        whole.failed += each.failed
        whole.seconds += each.seconds
    return whole


def read_figures(text: str) -> Figures:
    """The figures in the text of `/metrics`. Lines that this version does not know are skipped."""
    gauges, counters = dict.fromkeys(GAUGES, 0.0), dict.fromkeys(COUNTERS, 0.0)
    routes: dict[str, _Histogram] = {}
    store: dict[str, _Histogram] = {}
    for line in text.splitlines():
        if not line.startswith(_PREFIX) or (sample := _SAMPLE.fullmatch(line)) is None:
            continue
        name, value = sample[1].removeprefix(_PREFIX), float(sample[3])
        labels = dict(_LABEL.findall(sample[2] or ""))
        if name in gauges:
            gauges[name] = value
        elif name in counters:
            counters[name] += value
        elif (part := name.removeprefix("request_seconds_")) in _PARTS:
            row = f"{labels['method']} {labels['route']}"
            routes.setdefault(row, _Histogram()).add(part, labels, _result(labels["outcome"]), value)
        elif (part := name.removeprefix("store_seconds_")) in _PARTS:
            result = "failed" if labels["result"] == "error" else "fine"
            store.setdefault(labels["operation"], _Histogram()).add(part, labels, result, value)
    return Figures(gauges, counters, _rows(routes), _rows(store))


def _result(outcome: str) -> str:
    if outcome in _FAULTS or outcome in _BUSY:
        return "failed"
    return "fine" if outcome in _FINE else "refused"


def _rows(histograms: Mapping[str, _Histogram]) -> list[Times]:
    return _by_calls(histogram.times(name) for name, histogram in histograms.items())


class _Histogram:
    """The series of one row, which differ by outcome."""

    def __init__(self) -> None:
        self.cumulative: dict[float, float] = {}
        self.seconds = 0.0
        self.results = {"fine": 0.0, "refused": 0.0, "failed": 0.0}

    def add(self, part: str, labels: Mapping[str, str], result: str, value: float) -> None:
        match part:
            case "bucket":
                bound = float(labels["le"])
                self.cumulative[bound] = self.cumulative.get(bound, 0.0) + value
            case "sum":
                self.seconds += value
            case "count":
                self.results[result] += value

    def times(self, name: str) -> Times:
        bounds = sorted(self.cumulative)
        counts = [below - above for above, below in pairwise([0.0, *(self.cumulative[bound] for bound in bounds)])]
        finite = [bound for bound in bounds if math.isfinite(bound)]
        return Times(name, self.results["refused"], self.results["failed"], self.seconds, counts, finite)

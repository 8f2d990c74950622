"""The table of all metrics. Adding one: a line here, the call that reports it, and a line in docs/metrics.md.

Every label has a fixed set of values, so the number of series is bounded, whatever clients send: a layer's name, or
anything else that a client chooses, is never a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from batchnorm_client.wire.errors import PROBLEMS

Kind = Literal["counter", "gauge", "histogram", "info"]

OTHER: Final = "other"
DISCONNECTED: Final = "disconnected"
SUCCESS: Final = "2xx"
STATUS_CLASSES: Final = ("", "1xx", "2xx", "3xx", "4xx", "5xx")
"""By the first digit of a status."""

OUTCOMES: Final = (*STATUS_CLASSES[2:], DISCONNECTED, *PROBLEMS)
"""Every outcome of a request: the name of a problem type, or else the class of its status."""

LABELS: Final[dict[str, tuple[str, ...]]] = {
    "method": ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", OTHER),
    "outcome": OUTCOMES,
    "update": ("folds", "change", "receipt"),
    "lookup": ("hit", "miss"),
    "operation": (
        *("ping", "load", "create", "commit", "find_receipts", "delete", "join", "leave", "list"),
        *("kept", "load_kept", "pin", "pins", "unpin", "attachment", "attach"),
    ),
    "result": (
        *("ok", "error", "cancelled"),
        *("record", "unchanged", "missing", "exists", "full", "committed", "conflict", "duplicates"),
        *("pinned", "not_kept"),
    ),
}
"""The values of each label. Those of `route`, `version`, `python` and `torch` are known when the service starts."""

SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0)
COUNTS: Final = tuple(float(2**power) for power in range(11))


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A row of the table.

    Attributes:
        name: as Prometheus sees it: starts with `batchnorm_`, ends with the unit, that of a counter with `_total`.
        kind: a gauge is summed over the processes of a service; an info is the constant 1, with labels that inform.
        help: a sentence.
        labels: keys of `LABELS`.
        buckets: the upper bounds of a histogram, ascending.
        counts: of a counter that counts what this histogram observes, and so need not be reported.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    counts: Metric | None = None


METRICS: Final[list[Metric]] = []


def _metric(
    name: str,
    kind: Kind,
    text: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = (),
    counts: Metric | None = None,
) -> Metric:
    METRICS.append(Metric(f"batchnorm_{name}", kind, text, labels, buckets, counts))
    return METRICS[-1]


_REQUEST: Final = ("method", "route", "outcome")

REQUEST_SECONDS: Final = _metric(
    "request_seconds", "histogram", "Time from the end of a request to its response.", _REQUEST, SECONDS
)
REQUESTS: Final = _metric("requests_total", "counter", "Requests answered.", _REQUEST, counts=REQUEST_SECONDS)
REQUEST_BYTES: Final = _metric("request_bytes_total", "counter", "Bytes of request bodies.", _REQUEST)
RESPONSE_BYTES: Final = _metric("response_bytes_total", "counter", "Bytes of response bodies.", _REQUEST)
RUNNING_CALLS: Final = _metric("running_calls", "gauge", "Calls that run now.")
WAITING_CALLS: Final = _metric("waiting_calls", "gauge", "Calls that wait until layers change.")
BUFFERED_BYTES: Final = _metric("buffered_bytes", "gauge", "Bytes of incomplete requests and unsent responses.")

FOLDS: Final = _metric("folds_total", "counter", "Batches folded into a layer and committed.")
COMMITS: Final = _metric("commits_total", "counter", "Commits that the store confirmed.", ("update",))
FOLDS_PER_COMMIT: Final = _metric("folds_per_commit", "histogram", "Batches folded by one commit.", (), COUNTS)
CONFLICTS: Final = _metric(
    "conflicts_total", "counter", "Commits refused because another process had committed first.", ("update",)
)
RECEIPTS: Final = _metric("receipts_total", "counter", "Receipts written.")
QUEUED_UPDATES: Final = _metric("queued_updates", "gauge", "Updates that wait for the next commit of their layer.")
WAITING_IN_GROUPS: Final = _metric("waiting_in_groups", "gauge", "Batches that wait for others of their group.")

RESIDENT_LAYERS: Final = _metric("resident_layers", "gauge", "Layers in the cache.")
CACHE_LOOKUPS: Final = _metric(
    "cache_lookups_total", "counter", "Uses of a layer's state, with and without asking the store.", ("lookup",)
)
STORE_SECONDS: Final = _metric(
    "store_seconds", "histogram", "Time of the store's operations.", ("operation", "result"), SECONDS
)

WORKERS: Final = _metric("workers", "gauge", "Processes that serve.")
WORKER_STARTS: Final = _metric("worker_starts_total", "counter", "Starts of these processes.")
BUILD_INFO: Final = _metric("build_info", "info", "Versions of the service.", ("version", "python", "torch"))

"""Reports of the layers: their cache and their commits."""

from __future__ import annotations

from typing import Final, Literal

from batchnorm_service.telemetry.metrics import (
    CACHE_LOOKUPS,
    COMMITS,
    CONFLICTS,
    FOLDS,
    FOLDS_PER_COMMIT,
    QUEUED_UPDATES,
    RECEIPTS,
    WAITING_IN_GROUPS,
)
from batchnorm_service.telemetry.registry import Reporter

Update = Literal["folds", "change", "receipt"]
"""What a commit is for: batches together; a reset, PATCH or PUT state; a receipt alone."""

_UPDATES: Final[tuple[Update, ...]] = ("folds", "change", "receipt")


class LayerMetrics:
    """What all layers report to.

    Attributes:
        hits, misses: uses of a layer's state, without and with asking the store.
        queued: how many updates wait for the next commit of their layer.
        waiting_in_groups: how many calls wait for the other members of their group.
    """

    def __init__(self, metrics: Reporter) -> None:
        self.hits: Final = metrics.counter(CACHE_LOOKUPS, "hit")
        self.misses: Final = metrics.counter(CACHE_LOOKUPS, "miss")
        self._commits = {update: metrics.counter(COMMITS, update) for update in _UPDATES}
        self._conflicts = {update: metrics.counter(CONFLICTS, update) for update in _UPDATES}
        self._receipts = metrics.counter(RECEIPTS)
        self._folds = metrics.counter(FOLDS)
        self._folds_per_commit = metrics.histogram(FOLDS_PER_COMMIT)
        self.queued = self.waiting_in_groups = 0
        metrics.gauge(QUEUED_UPDATES, lambda: self.queued)
        metrics.gauge(WAITING_IN_GROUPS, lambda: self.waiting_in_groups)

    def committed(self, update: Update, receipts: int) -> None:
        """A commit with so many receipts."""
        self._commits[update].add()
        self._receipts.add(receipts)

    def folded(self, batches: int) -> None:
        """A commit has folded so many batches."""
        self._folds.add(batches)
        self._folds_per_commit.observe(batches)

    def conflicted(self, update: Update) -> None:
        """A commit was refused because another process had committed first."""
        self._conflicts[update].add()

"""A layer's last known committed state, and the check whether it is still the newest."""

from __future__ import annotations

import math
from collections.abc import Callable

from batchnorm_client.wire.errors import LayerNotFound, StoreUnavailable

from ..runtime import Runtime
from ..store.base import Missing, Stamp, Store, StoreError, Unchanged
from ..telemetry.layers import LayerMetrics
from .records import CommittedLayer, decode
from .shared_check import SharedCheck


class CachedState:
    """Cache of one layer's committed state.

    Args:
        name: the layer's name.
        store: the store of its record.
        max_staleness: see `fresh`.
        runtime: clock, tasks.
        metrics: what is reported of lookups.
        changed: called with the name when there is, or may be, another state.

    Attributes:
        name: the layer's name.
        layer: the last known committed state; None if not loaded, or after a commit with an unknown outcome.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        max_staleness: float,
        runtime: Runtime,
        metrics: LayerMetrics,
        changed: Callable[[str], object] = lambda _name: None,
    ) -> None:
        self._runtime = runtime
        self.name = name
        self.layer: CommittedLayer | None = None
        self._store = store
        self._max_staleness = max_staleness
        self._checked = -math.inf  # start of the last check of the store that confirmed or loaded `layer`
        self._changes = 0
        self._check = SharedCheck(self._load, runtime)
        self._metrics = metrics
        self._changed = changed

    @property
    def idle(self) -> bool:
        """Whether no check is running."""
        return self._check.idle

    def set(self, layer: CommittedLayer | None) -> None:
        """Set the state after a commit; None if it is unknown."""
        self.layer = layer
        self._changes += 1
        self._changed(self.name)

    async def latest_known(self) -> CommittedLayer:
        """A committed state, perhaps not the newest: enough where a commit will compare its stamp.

        Raises:
            LayerNotFound: there is no such layer.
            StoreUnavailable: the store does not answer.
        """
        return self._hit(self.layer) or await self._checked_state()

    async def fresh(self) -> CommittedLayer:
        """The newest committed state: it includes every update acknowledged before this call.

        With `max_staleness`, updates of that many seconds before this call may be missing.

        Raises:
            LayerNotFound: there is no such layer.
            StoreUnavailable: the store does not answer.
        """
        return self._hit(self.trusted) or await self._checked_state()

    @property
    def trusted(self) -> CommittedLayer | None:
        """The result of `fresh`, if it is known without checking the store; otherwise None."""
        if self.layer is not None and (
            self._store.exclusive or self._runtime.now() - self._checked < self._max_staleness
        ):
            return self.layer
        return None

    def _hit(self, layer: CommittedLayer | None) -> CommittedLayer | None:
        if layer is not None:
            self._metrics.hits.add()
        return layer

    async def _checked_state(self) -> CommittedLayer:
        self._metrics.misses.add()
        return await self._check()

    async def _load(self) -> CommittedLayer:
        cached, changes, began = self.layer, self._changes, self._runtime.now()
        unless: Stamp | None = cached.stamp if cached else None
        try:
            found = await self._store.load(self.name, unless)
        except StoreError as error:
            raise store_unavailable(error) from error
        if isinstance(found, Unchanged):
            assert cached is not None  # noqa: S101 - the load had a stamp
            if changes == self._changes:
                self._checked = began
            return cached
        loaded = None if isinstance(found, Missing) else decode(found)
        # This process may have committed meanwhile, so the loaded state may be older than `self.layer`. It is fresh
        # enough for this call, which arrived before the load began, but must not replace `self.layer`.
        if changes == self._changes:
            self.layer, self._checked = loaded, began
        if cached is not None:
            self._changed(self.name)
        if loaded is None:
            raise layer_not_found(self.name)
        return loaded


def layer_not_found(name: str) -> LayerNotFound:
    """The error for a name that no layer has."""
    return LayerNotFound(
        f"there is no layer {name!r}; create it with PUT /v1/layers/{name}", field="name", expected="a layer", got=name
    )


def store_unavailable(error: StoreError) -> StoreUnavailable:
    """The problem for a failed call of the store."""
    return StoreUnavailable(f"the store does not answer: {error}", retry_after=1)

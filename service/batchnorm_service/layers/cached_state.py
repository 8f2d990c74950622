"""One layer in memory: what was committed last, and how to know that it still is."""

from __future__ import annotations

import math

from batchnorm_client.wire.errors import LayerNotFound, StoreUnavailable

from ..runtime import Runtime
from ..store.base import Missing, Stamp, Store, StoreError, Unchanged
from .records import CommittedLayer, decode
from .shared_check import SharedCheck


class CachedState:
    """A layer's newest known committed state.

    Attributes:
        name: of the layer.
        layer: what this process knows of the layer; None when it knows nothing, or a commit's outcome is unknown.
    """

    def __init__(self, name: str, store: Store, max_staleness: float, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name = name
        self.layer: CommittedLayer | None = None
        self._store = store
        self._max_staleness = max_staleness
        self._asked = -math.inf  # when the newest look at the store began that `layer` rests on
        self._changes = 0
        self._check = SharedCheck(self._load, runtime)

    @property
    def idle(self) -> bool:
        """Whether nobody is asking the store about this layer."""
        return self._check.idle

    def set(self, layer: CommittedLayer | None) -> None:
        """Note what a commit left, or None when that is not known."""
        self.layer = layer
        self._changes += 1

    async def known(self) -> CommittedLayer:
        """A committed state, perhaps not the newest: good where a commit will check it.

        Raises:
            LayerNotFound: there is no such layer.
            StoreUnavailable: the store does not answer.
        """
        return self.layer or await self._check()

    async def fresh(self) -> CommittedLayer:
        """The newest committed state: no fold that was acknowledged before this call is missing from it.

        With `max_staleness`, none that was acknowledged so many seconds earlier.

        Raises:
            LayerNotFound: there is no such layer.
            StoreUnavailable: the store does not answer.
        """
        return self.certain or await self._check()

    @property
    def certain(self) -> CommittedLayer | None:
        """The same, if the store need not be asked."""
        if self.layer is not None and (
            self._store.exclusive or self._runtime.now() - self._asked < self._max_staleness
        ):
            return self.layer
        return None

    async def _load(self) -> CommittedLayer:
        asked, changes, began = self.layer, self._changes, self._runtime.now()
        unless: Stamp | None = asked.stamp if asked else None
        try:
            found = await self._store.load(self.name, unless)
        except StoreError as error:
            raise StoreUnavailable(f"the store does not answer: {error}", retry_after=1) from error
        if isinstance(found, Unchanged):
            assert asked is not None  # noqa: S101 - only a stamp can be unchanged
            if changes == self._changes:
                self._asked = began
            return asked
        loaded = None if isinstance(found, Missing) else decode(found)
        # A commit of ours that was acknowledged meanwhile may be newer than what was found: this call may use what it
        # found, since it asked after it came, but only a later one may say which of the two stays.
        if changes == self._changes:
            self.layer, self._asked = loaded, began
        if loaded is None:
            raise layer_not_found(self.name)
        return loaded


def layer_not_found(name: str) -> LayerNotFound:
    """The error for a name that no layer has."""
    return LayerNotFound(
        f"there is no layer {name!r}; create it with PUT /v1/layers/{name}", field="name", expected="a layer", got=name
    )

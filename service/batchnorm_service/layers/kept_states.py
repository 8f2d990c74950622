"""A layer's kept states, by version or tag."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from batchnorm_client.wire.documents import MAX_VERSION
from batchnorm_client.wire.errors import StoreUnavailable, VersionNotFound

from ..store.base import Missing, NotKept, Store, StoreError, Unchanged
from .cached_state import layer_not_found
from .records import CommittedLayer, decode

_CACHED: Final = 8
"""States of one layer in memory, besides the newest."""

_CACHED_BYTES: Final = 1 << 22
"""Of these states together; a larger one is cached alone. Callers who only read choose how many states are read."""


class KeptStates:
    """Reads a layer's kept states, and caches those that were used last."""

    def __init__(self, name: str, store: Store) -> None:
        self._name = name
        self._store = store
        self._cached: OrderedDict[int | str, CommittedLayer] = OrderedDict()
        self._changes = 0

    def forget(self) -> None:
        """Clear the cache, after a pin or the layer was deleted."""
        self._cached.clear()
        self._changes += 1

    async def get(self, at: int | str, field: str = "at") -> CommittedLayer:
        """The kept state of a version (also that of the newest) or of a tag; `field` is where the caller named it.

        Raises:
            LayerNotFound: there is no such layer.
            VersionNotFound: the layer has no such version any more, or no such tag.
            StoreUnavailable: the store does not answer.
        """
        cached, changes = self._cached.get(at), self._changes
        # A tag stands for one state until its pin is deleted. A version is checked: it may be the newest when it is
        # read, and then be replaced without being kept.
        if cached is not None and self._store.exclusive and isinstance(at, str):
            self._cached.move_to_end(at)
            return cached
        try:
            # No layer has a higher version, and a store would have to know what to do with more than 64 bits.
            known = min(at, MAX_VERSION) if isinstance(at, int) else at
            found = await self._store.load_kept(self._name, known, None if cached is None else cached.stamp)
        except StoreError as error:
            raise StoreUnavailable(f"the store does not answer: {error}", retry_after=1) from error
        if isinstance(found, Unchanged):
            assert cached is not None  # noqa: S101 - the load had a stamp
            return cached
        if isinstance(found, Missing):
            raise layer_not_found(self._name)
        if isinstance(found, NotKept):
            raise version_not_found(self._name, at, field)
        layer = decode(found)
        if changes == self._changes:
            self._cached[at] = layer
            room = min(_CACHED, max(_CACHED_BYTES // len(found.data), 1))  # a layer's states have about the same size
            while len(self._cached) > room:
                self._cached.popitem(last=False)
        return layer


def version_not_found(name: str, at: int | str, field: str) -> VersionNotFound:
    """The error for a version or tag that is not kept."""
    kind = "version" if isinstance(at, int) else "pin"
    return VersionNotFound(
        f"layer {name!r} has no {kind} {at}; GET /v1/layers/{name}/history lists what is kept",
        field=field,
        expected="a kept version, or the tag of a pin",
        got=at,
    )

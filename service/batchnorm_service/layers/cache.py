"""The cached layers: each with its queue and its open groups, least recently used ones let go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from ..store.base import Store
from .cached_state import CachedState
from .groups import Groups
from .records import CommittedLayer
from .results import LayersOptions
from .update_queue import Queue


class CacheEntry:
    """A cached layer with its queue and groups, and how many calls are using them."""

    def __init__(self, name: str, store: Store, options: LayersOptions) -> None:
        self.cached = CachedState(name, store, options.max_staleness)
        self.queue = Queue(self.cached, store, options.queue_length, options.store_timeout)
        self.groups = Groups(name, store, self.queue)
        self.users = 0

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return self.users == 0 and self.queue.idle and self.cached.idle


class LayerCache:
    """All cached layers, by name."""

    def __init__(self, store: Store, options: LayersOptions) -> None:
        self._store = store
        self._options = options
        self._entries: OrderedDict[str, CacheEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> CacheEntry | None:
        """The entry of a layer if it is cached. Not counted as a use: let go of it before anything is awaited."""
        entry = self._entries.get(name)
        if entry is not None:
            self._entries.move_to_end(name)
        return entry

    def certain(self, name: str) -> CommittedLayer | None:
        """The layer's newest committed state, if the store need not be asked."""
        entry = self.get(name)
        return None if entry is None else entry.cached.certain

    @contextmanager
    def use(self, name: str) -> Iterator[CacheEntry]:
        """The entry of a layer, kept cached while it is used: a layer must not have two queues and caches."""
        entry = self._entries.get(name)
        new = entry is None
        if entry is None:
            entry = self._entries[name] = CacheEntry(name, self._store, self._options)
        else:
            self._entries.move_to_end(name)
        entry.users += 1
        try:
            if new:
                self._evict()  # after this use is counted, or the new entry might itself be evicted
            yield entry
        finally:
            entry.users -= 1
            # A name that no layer has takes no room. Only this entry may go: another may stand under the name by now.
            if entry.cached.layer is None and entry.idle and self._entries.get(name) is entry:
                del self._entries[name]

    async def drained(self) -> None:
        """Return when everything that waits in a queue has been answered."""
        for entry in list(self._entries.values()):
            await entry.queue.drained()

    def _evict(self) -> None:
        """Let go of the layers that were used longest ago, but of none in use."""
        surplus = len(self._entries) - self._options.resident_layers
        if surplus > 0:
            idle = (name for name, entry in self._entries.items() if entry.idle)
            for name in list(islice(idle, surplus)):
                del self._entries[name]

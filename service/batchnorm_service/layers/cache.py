"""The cached layers: each with its queue and its open groups, least recently used ones let go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Self

from ..runtime import Runtime
from ..store.base import Store
from .cached_state import CachedState
from .groups import Groups
from .records import CommittedLayer
from .results import LayersOptions
from .update_queue import Queue


class CacheEntry:
    """A cached layer with its queue and groups, and how many calls are using them.

    A context manager: whoever uses it counts as a user inside.

    Args:
        name: of the layer.
        store: where it is kept.
        options: bounds of its queue and of its staleness.
        runtime: clock and chance.
        unused: is called when the last user leaves a name that no layer has.
    """

    def __init__(
        self, name: str, store: Store, options: LayersOptions, runtime: Runtime, unused: Callable[[CacheEntry], object]
    ) -> None:
        self._unused = unused
        self.cached = CachedState(name, store, options.max_staleness, runtime)
        self.queue = Queue(self.cached, store, options.queue_length, options.store_timeout, runtime)
        self.groups = Groups(name, store, self.queue, runtime)
        self.users = 0

    def __enter__(self) -> Self:
        self.users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        if self.cached.layer is None and self.idle:
            self._unused(self)

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return self.users == 0 and self.queue.idle and self.cached.idle


class LayerCache:
    """All cached layers, by name."""

    def __init__(self, store: Store, options: LayersOptions, runtime: Runtime) -> None:
        self._store = store
        self._runtime = runtime
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

    def use(self, name: str) -> CacheEntry:
        """The entry of a layer, kept cached while it is used: a layer must not have two queues and caches.

        To be entered at once: `with cache.use(name) as entry:`.
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = CacheEntry(name, self._store, self._options, self._runtime, self._forget)
            self._evict(entry)
        else:
            self._entries.move_to_end(name)
        return entry

    async def drained(self) -> None:
        """Return when everything that waits in a queue has been answered."""
        for entry in list(self._entries.values()):
            await entry.queue.drained()

    def _forget(self, entry: CacheEntry) -> None:
        """Let go of this entry, and not of another that stands under the name by now."""
        if self._entries.get(entry.cached.name) is entry:
            del self._entries[entry.cached.name]

    def _evict(self, new: CacheEntry) -> None:
        """Let go of the layers that were used longest ago, but of none in use, nor of the new one."""
        surplus = len(self._entries) - self._options.resident_layers
        if surplus > 0:
            idle = (name for name, entry in self._entries.items() if entry.idle and entry is not new)
            for name in list(islice(idle, surplus)):
                del self._entries[name]

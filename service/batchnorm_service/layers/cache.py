"""LRU cache of layers, each with its update queue and groups."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Self

from ..runtime import Runtime
from ..store.base import Store
from ..telemetry.layers import LayerMetrics
from .cached_state import CachedState
from .compute import ComputeExecutor
from .groups import Groups
from .kept_states import KeptStates
from .records import CommittedLayer
from .results import LayersOptions
from .store_calls import StoreCalls
from .update_queue import CommitObserver, NoObserver, UpdateQueue


class CacheEntry:
    """A cached layer with its update queue, its groups, and a count of the calls that use it.

    A context manager: a call is counted as a user inside its `with` block.

    Args:
        name: the layer's name.
        store: the store of its record.
        executor: where large stacks of moments are folded.
        options: limits of its queue and of its staleness.
        runtime: clock, random numbers, tasks.
        metrics: what is reported of it.
        unused: called when the last user leaves the entry of a name that has no layer.
        changed: called with the name when there is, or may be, another state.
        observer: told what was folded, and when statistics were set.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        executor: ComputeExecutor,
        options: LayersOptions,
        runtime: Runtime,
        metrics: LayerMetrics,
        unused: Callable[[CacheEntry], object],
        changed: Callable[[str], object],
        observer: CommitObserver,
    ) -> None:
        self._unused = unused
        self.cached = CachedState(name, store, options.max_staleness, runtime, metrics, changed)
        self.kept = KeptStates(name, store)
        self.calls = StoreCalls(self.cached, store, options.store_timeout, runtime, metrics)
        self.queue = UpdateQueue(self.cached, self.kept, self.calls, executor, options, runtime, metrics, observer)
        self.groups = Groups(name, store, self.queue, self.calls, options, runtime, metrics)
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
        """Whether it can be evicted: no call, queued update or check uses it."""
        return self.users == 0 and self.queue.idle and self.cached.idle


class LayerCache:
    """All cached layers, by name.

    Attributes:
        changed: called with a layer's name when there is, or may be, another state of it.
        observer: of the commits; to be set before the cache is used.
    """

    def __init__(
        self,
        store: Store,
        executor: ComputeExecutor,
        options: LayersOptions,
        runtime: Runtime,
        metrics: LayerMetrics,
    ) -> None:
        self._store = store
        self._executor = executor
        self._runtime = runtime
        self._options = options
        self._metrics = metrics
        self._report_hit = metrics.hits.add
        self.changed: Callable[[str], object] = lambda _name: None
        self.observer: CommitObserver = NoObserver()
        self._entries: OrderedDict[str, CacheEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> CacheEntry | None:
        """The entry of a layer if it is cached. It may be evicted at the next await, since its user is not counted."""
        entry = self._entries.get(name)
        if entry is not None:
            self._entries.move_to_end(name)
        return entry

    def trusted(self, name: str) -> CommittedLayer | None:
        """The layer's newest committed state, if it is known without checking the store."""
        entry = self.get(name)
        layer = None if entry is None else entry.cached.trusted
        if layer is not None:
            self._report_hit()
        return layer

    def use(self, name: str) -> CacheEntry:
        """The entry of a layer. It is not evicted while in use, since a layer must not have two queues.

        Enter it without an await in between: `with cache.use(name) as entry:`.
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = CacheEntry(
                name,
                self._store,
                self._executor,
                self._options,
                self._runtime,
                self._metrics,
                self._forget,
                self._report_change,
                self.observer,
            )
            self._evict(entry)
        else:
            self._entries.move_to_end(name)
        return entry

    async def drained(self) -> None:
        """Return when all queues are empty and their last updates are committed or refused."""
        for entry in list(self._entries.values()):
            await entry.queue.drained()

    def _report_change(self, name: str) -> None:
        self.changed(name)

    def _forget(self, entry: CacheEntry) -> None:
        """Remove this entry, unless a newer one has replaced it."""
        if self._entries.get(entry.cached.name) is entry:
            del self._entries[entry.cached.name]

    def _evict(self, new: CacheEntry) -> None:
        """Remove the least recently used idle entries, except the new one, until the cache is within its limit."""
        surplus = len(self._entries) - self._options.resident_layers
        if surplus > 0:
            idle = (name for name, entry in self._entries.items() if entry.idle and entry is not new)
            for name in list(islice(idle, surplus)):
                del self._entries[name]

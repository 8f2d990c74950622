"""The resident layers: each with its queue and its open groups, least recently used ones let go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from ..store.base import Store
from .cached_state import Resident
from .groups import Groups
from .records import Held
from .results import LayersOptions
from .update_queue import Queue


class Slot:
    """A resident layer with its queue and groups, and how many calls are using them."""

    def __init__(self, name: str, store: Store, options: LayersOptions) -> None:
        self.resident = Resident(name, store, options.max_staleness)
        self.queue = Queue(self.resident, store, options.queue_length, options.store_timeout)
        self.groups = Groups(name, store, self.queue)
        self.users = 0

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return self.users == 0 and self.queue.idle and self.resident.idle


class Slots:
    """All resident layers, by name."""

    def __init__(self, store: Store, options: LayersOptions) -> None:
        self._store = store
        self._options = options
        self._slots: OrderedDict[str, Slot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def get(self, name: str) -> Slot | None:
        """The slot of a layer if it is resident. Not counted as a use: let go of it before anything is awaited."""
        slot = self._slots.get(name)
        if slot is not None:
            self._slots.move_to_end(name)
        return slot

    def certain(self, name: str) -> Held | None:
        """The layer's newest committed state, if the store need not be asked."""
        slot = self.get(name)
        return None if slot is None else slot.resident.certain

    @contextmanager
    def use(self, name: str) -> Iterator[Slot]:
        """The slot of a layer, kept resident while it is used: a layer must not have two queues and caches."""
        slot = self._slots.get(name)
        new = slot is None
        if slot is None:
            slot = self._slots[name] = Slot(name, self._store, self._options)
        else:
            self._slots.move_to_end(name)
        slot.users += 1
        try:
            if new:
                self._evict()  # after this use is counted, or the new slot might itself be evicted
            yield slot
        finally:
            slot.users -= 1
            # A name that no layer has takes no room. Only this slot may go: another may stand under the name by now.
            if slot.resident.held is None and slot.idle and self._slots.get(name) is slot:
                del self._slots[name]

    async def drained(self) -> None:
        """Return when everything that waits in a queue has been answered."""
        for slot in list(self._slots.values()):
            await slot.queue.drained()

    def _evict(self) -> None:
        """Let go of the layers that were used longest ago, but of none in use."""
        surplus = len(self._slots) - self._options.resident_layers
        if surplus > 0:
            idle = (name for name, slot in self._slots.items() if slot.idle)
            for name in list(islice(idle, surplus)):
                del self._slots[name]

"""Listing of layer names, merged from the buckets' indexes, and the count of layers."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Coroutine
from heapq import heappop, heappush
from typing import Any, Final

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.valkey.commands import CommandRunner
from batchnorm_service.store.valkey.keys import BUCKETS, Keys
from batchnorm_service.store.valkey.scripts import COUNT, NAMES

_RECOUNT_SECONDS: Final = 1.0


class Names:
    """Sorted listing of names that start with a prefix, merged from all buckets.

    Names are spread evenly, so each bucket is first queried for about its share of the expected number, and queried
    again only if it has more. The first queries are queued on construction, so that the listing takes effect in order.

    Args:
        runner: runs scripts.
        keys: the store's keys.
        prefix: prefix of the names.
        after: only names that sort after this.
        expected: about how many names will be taken.
    """

    def __init__(self, runner: CommandRunner, keys: Keys, prefix: str, after: str, expected: int) -> None:
        self._runner = runner
        self._keys = keys
        first, last = prefix.encode(), after.encode()
        self._from = b"[" + first if first > last else b"(" + last
        self._to = b"(" + first + b"\xff" if first else b"+"  # no byte of UTF-8 is 0xff
        share = expected / BUCKETS
        self._chunk = math.ceil(share + 3 * math.sqrt(share)) + 1
        self._heap: list[tuple[bytes, int]] = []  # the next name of each bucket
        self._waiting: list[deque[bytes]] = [deque() for _ in range(BUCKETS)]  # the names after it
        self._more = [True] * BUCKETS
        self._first = [self._ask(bucket, self._from) for bucket in range(BUCKETS)]

    async def take(self, count: int) -> list[str]:
        """The next `count` names; fewer at the end."""
        if self._first:
            first, self._first = self._first, []
            for bucket, names in enumerate(await asyncio.gather(*first)):
                self._add(bucket, names)
        taken: list[str] = []
        while self._heap and len(taken) < count:
            name, bucket = heappop(self._heap)
            taken.append(name.decode())
            if self._waiting[bucket]:
                heappush(self._heap, (self._waiting[bucket].popleft(), bucket))
            elif self._more[bucket]:
                self._add(bucket, await self._ask(bucket, b"(" + name))
        return taken

    def _ask(self, bucket: int, start: bytes) -> Coroutine[Any, Any, list[bytes]]:
        return self._runner.run(NAMES, bucket, [self._keys.names(bucket)], [start, self._to, self._chunk])

    def _add(self, bucket: int, names: list[bytes]) -> None:
        self._more[bucket] = len(names) == self._chunk
        self._waiting[bucket].extend(names)
        if names:
            heappush(self._heap, (self._waiting[bucket].popleft(), bucket))


class LayerCounter:
    """Count of all layers: queried from the buckets now and then, and updated by this process's own calls in between.

    Each bucket has its own count; there is no total in the store. Changes by other processes are seen within a second.
    """

    def __init__(self, runner: CommandRunner, keys: Keys, runtime: Runtime) -> None:
        self._runtime = runtime
        self._runner = runner
        self._keys = keys
        self._layers = 0
        self._pending = 0
        self._counted = -math.inf
        self._lock = asyncio.Lock()

    def begin_create(self, limit: int) -> bool:
        """Start to create a layer: whether the limit allows it. `end_create` must follow."""
        room = self._layers + self._pending < limit
        self._pending += 1
        return room

    def end_create(self, created: bool) -> None:
        """Finish creating a layer."""
        self._pending -= 1
        self._layers += created

    def deleted(self) -> None:
        """Count a deleted layer."""
        self._layers -= 1

    async def refresh(self) -> None:
        """Count again. Concurrent calls share a count that started after they were called."""
        called = self._runtime.now()
        async with self._lock:
            if self._counted < called:
                began = self._runtime.now()
                counts = [self._runner.run(COUNT, bucket, [self._keys.names(bucket)]) for bucket in range(BUCKETS)]
                self._layers = sum(await asyncio.gather(*counts))
                self._counted = began

    async def refresh_if_old(self) -> None:
        """Count again if the last count is old; if that fails, keep the old count."""
        if self._runtime.now() - self._counted > _RECOUNT_SECONDS:
            with contextlib.suppress(StoreError):
                await self.refresh()

"""The names of all layers: in order, from 256 indexes that each know some of them, and how many there are."""

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
    """Names that start with a prefix and follow another name, in the order of their bytes.

    Names are spread evenly, so each bucket is asked for about its share, and only those whose share was larger are
    asked again. The first question to every bucket is queued when this is made.

    Args:
        calls: runs scripts.
        keys: of the indexes.
        prefix: of the names.
        after: where to start.
        expected: about how many names will be taken.
    """

    def __init__(self, calls: CommandRunner, keys: Keys, prefix: str, after: str, expected: int) -> None:
        self._calls = calls
        self._keys = keys
        first, last = prefix.encode(), after.encode()
        self._from = b"[" + first if first > last else b"(" + last
        self._to = b"(" + first + b"\xff" if first else b"+"  # no byte of UTF-8 is 0xff
        share = expected / BUCKETS
        self._chunk = math.ceil(share + 3 * math.sqrt(share)) + 1
        self._heap: list[tuple[bytes, int]] = []  # the next name of each bucket
        self._waiting: list[deque[bytes]] = [deque() for _ in range(BUCKETS)]  # those behind it
        self._more = [True] * BUCKETS
        self._first = [self._ask(bucket, self._from) for bucket in range(BUCKETS)]

    async def take(self, count: int) -> list[str]:
        """The next names: fewer than `count` when there are no more."""
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
        return self._calls.run(NAMES, bucket, [self._keys.names(bucket)], [start, self._to, self._chunk])

    def _add(self, bucket: int, names: list[bytes]) -> None:
        self._more[bucket] = len(names) == self._chunk
        self._waiting[bucket].extend(names)
        if names:
            heappush(self._heap, (self._waiting[bucket].popleft(), bucket))


class LayerCounter:
    """How many layers there are: counted now and then, and reckoned in between from what this process does.

    Each bucket knows its own number, but no server knows the sum. With other processes at work the sum here may be a
    second old.
    """

    def __init__(self, calls: CommandRunner, keys: Keys, runtime: Runtime) -> None:
        self._runtime = runtime
        self._calls = calls
        self._keys = keys
        self._layers = 0
        self._pending = 0
        self._counted = -math.inf
        self._lock = asyncio.Lock()

    def begin(self, limit: int) -> bool:
        """A layer is about to be created: whether there is room. `end` must follow."""
        room = self._layers + self._pending < limit
        self._pending += 1
        return room

    def end(self, created: bool) -> None:
        """What became of it."""
        self._pending -= 1
        self._layers += created

    def deleted(self) -> None:
        """A layer was deleted."""
        self._layers -= 1

    async def refresh(self) -> None:
        """Count again if it was not just done. Whoever comes while others count waits for a count of its own time."""
        asked = self._runtime.now()
        async with self._lock:
            if self._counted < asked:
                began = self._runtime.now()
                counts = [self._calls.run(COUNT, bucket, [self._keys.names(bucket)]) for bucket in range(BUCKETS)]
                self._layers = sum(await asyncio.gather(*counts))
                self._counted = began

    async def refresh_if_old(self) -> None:
        """Count again if that was long ago; without an answer the old number has to do."""
        if self._runtime.now() - self._counted > _RECOUNT_SECONDS:
            with contextlib.suppress(StoreError):
                await self.refresh()

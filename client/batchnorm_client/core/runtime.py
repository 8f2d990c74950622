"""Clock, random numbers, sleep and threads of a client.

Nothing else in `core` uses the system's, so that a simulation can replace them.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Runtime:
    """What both clients use."""

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970, from the system's clock."""
        return time.time()

    def random(self) -> float:
        """A random number in [0, 1), for spreading load; not for secrets."""
        return random.random()  # noqa: S311

    def key(self) -> str:
        """A new, unique idempotency key."""
        return uuid.uuid4().hex


class SyncRuntime(Runtime):
    """The runtime of `Client`."""

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def run(self, function: Callable[[], T]) -> T:
        """Compute, in the calling thread."""
        return function()


class AsyncRuntime(Runtime):
    """The runtime of `AsyncClient`. anyio is imported when it is first needed, because that takes long."""

    async def sleep(self, seconds: float) -> None:
        """Wait without blocking the event loop."""
        import anyio  # noqa: PLC0415

        await anyio.sleep(seconds)

    async def run(self, function: Callable[[], T]) -> T:
        """Compute in a thread, without blocking the event loop."""
        from anyio import to_thread  # noqa: PLC0415

        return await to_thread.run_sync(function)

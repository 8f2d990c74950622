"""Clock, chance, sleep and threads of a client.

Nothing else in `core` asks the system for them, so that a simulation can bring its own.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Runtime:
    """What both clients have in common."""

    def now(self) -> float:
        """Seconds from any start; never set back."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970, as the system's clock has them."""
        return time.time()

    def random(self) -> float:
        """At least 0 and less than 1: spreads load, keeps no secret."""
        return random.random()  # noqa: S311

    def key(self) -> str:
        """An idempotency key that nobody else has."""
        return uuid.uuid4().hex


class SyncRuntime(Runtime):
    """That of `Client`."""

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def run(self, function: Callable[[], T]) -> T:
        """Compute, where the caller is."""
        return function()


class AsyncRuntime(Runtime):
    """That of `AsyncClient`. anyio is imported when it is first needed, as it takes long to import."""

    async def sleep(self, seconds: float) -> None:
        """Wait; others go on."""
        import anyio  # noqa: PLC0415

        await anyio.sleep(seconds)

    async def run(self, function: Callable[[], T]) -> T:
        """Compute in a thread; others go on."""
        from anyio import to_thread  # noqa: PLC0415

        return await to_thread.run_sync(function)

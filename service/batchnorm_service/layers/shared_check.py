"""One check for many: how calls share a question whose answer must be newer than each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from ..runtime import Runtime

T = TypeVar("T")


class SharedCheck(Generic[T]):
    """Runs `check` so that every caller gets an answer to a question that was sent after the caller arrived.

    Callers that arrive while a check is on its way share the next one, so at most one runs at a time.
    """

    def __init__(self, check: Callable[[], Coroutine[Any, Any, T]], runtime: Runtime) -> None:
        self._runtime = runtime
        self._check = check
        self._running: asyncio.Task[T] | None = None
        self._waiting: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """The answer of a check that begins after this call. Raises what the check raises."""
        if self._waiting is None:
            if self._running is None or self._running.done():
                self._running = self._runtime.create_task(self._check())
                return await asyncio.shield(self._running)
            self._waiting = self._runtime.create_task(self._after(self._running))
        return await asyncio.shield(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no check is on its way."""
        return self._waiting is None and (self._running is None or self._running.done())

    async def _after(self, earlier: asyncio.Task[T]) -> T:
        await asyncio.wait([earlier])
        # From here on this is the check on its way: whoever comes now must wait for another.
        self._running, self._waiting = self._waiting, None
        return await self._check()

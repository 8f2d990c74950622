"""Shares one running check among many callers, each of whom needs a check that starts after its call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from ..runtime import Runtime

T = TypeVar("T")


class SharedCheck(Generic[T]):
    """Coalesces concurrent calls of `check`.

    Every caller gets the result of a check that started after its call. Callers that arrive during a check share the
    next one, so at most one runs at a time.
    """

    def __init__(self, check: Callable[[], Coroutine[Any, Any, T]], runtime: Runtime) -> None:
        self._runtime = runtime
        self._check = check
        self._running: asyncio.Task[T] | None = None
        self._waiting: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """The result of a check that starts after this call. Raises what the check raises."""
        if self._waiting is None:
            if self._running is None or self._running.done():
                self._running = self._runtime.create_task(self._check())
                return await asyncio.shield(self._running)
            self._waiting = self._runtime.create_task(self._after(self._running))
        return await asyncio.shield(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no check is running."""
        return self._waiting is None and (self._running is None or self._running.done())

    async def _after(self, earlier: asyncio.Task[T]) -> T:
        await asyncio.wait([earlier])
        # This check is now the running one: later callers wait for another.
        self._running, self._waiting = self._waiting, None
        return await self._check()

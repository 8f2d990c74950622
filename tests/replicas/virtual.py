"""Time that passes only while nothing can run: no wait takes time, and what comes of it is the same on any machine."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        assert ready or timeout is not None, "everything waits, and nothing will happen"
        if not ready:
            self.now += timeout or 0.0
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(work: Coroutine[Any, Any, T]) -> T:
    """What `asyncio.run` does."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


class Distant:
    """A store that is so many seconds away, there and back."""

    def __init__(self, store: Any, seconds: float) -> None:
        self._store = store
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def load(self, *arguments: Any) -> Any:
        await asyncio.sleep(self._seconds / 2)
        answer = await self._store.load(*arguments)
        await asyncio.sleep(self._seconds / 2)
        return answer

    async def commit(self, *arguments: Any) -> Any:
        await asyncio.sleep(self._seconds / 2)
        answer = await self._store.commit(*arguments)
        await asyncio.sleep(self._seconds / 2)
        return answer

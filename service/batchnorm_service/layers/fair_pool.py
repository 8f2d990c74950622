"""Thread pool whose threads the layers use in turn, so that large calls on one layer do not hold up those on others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Final, ParamSpec, TypeVar

from ..runtime import Runtime

P = ParamSpec("P")
R = TypeVar("R")

CALLED_LAYER: Final[ContextVar[str | None]] = ContextVar("CALLED_LAYER", default=None)
"""The layer of the call that runs now; None if it has none, or several."""


class FairPool:
    """Runs functions in threads, for the layers that have work in turn, and for each layer in order.

    Args:
        executor: the threads.
        threads: how many there are. One more function than threads is handed over, so that none has to wait for the
            event loop when it is done.
        runtime: starts the functions.
    """

    def __init__(self, executor: ThreadPoolExecutor, threads: int, runtime: Runtime) -> None:
        self._executor = executor
        self._free = threads + 1
        self._runtime = runtime
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in a thread, when it is its layer's turn."""
        await self._acquire(CALLED_LAYER.get())
        try:
            return await self._runtime.in_thread(self._executor, function, *args, **kwargs)
        finally:
            self._release()

    def shutdown(self) -> None:
        """Stop the threads."""
        self._executor.shutdown()

    async def _acquire(self, layer: str | None) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = self._runtime.future()
        self._waiting.setdefault(layer, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._release()  # it was this call's turn already
            raise

    def _release(self) -> None:
        while self._waiting:
            layer = next(iter(self._waiting))
            waiting = self._waiting.pop(layer)
            turn = waiting.popleft()
            if waiting:
                self._waiting[layer] = waiting  # behind the other layers
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

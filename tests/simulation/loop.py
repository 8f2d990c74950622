"""An event loop on which a seed decides what runs next, and on which time passes only while nothing can run."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("PROCESS", default=None)


class Process:
    """A process of the simulated world: what runs in its context ends with it, as with SIGKILL.

    No `finally` of a killed process runs, and no reply of it leaves: callbacks in its context are dropped.

    Attributes:
        name: for the trace.
        alive: False from when it was killed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)
        self._tasks: list[asyncio.Task[Any]] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.append(task)  # a killed process's tasks stay pending; they must not be collected, which runs code
        return task

    def kill(self) -> None:
        """Nothing of it runs from now on."""
        self.alive = False


class _Ready(deque[asyncio.Handle]):
    """The callbacks that can run: which one is next is drawn; those of killed processes are dropped."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random

    def popleft(self) -> asyncio.Handle:
        self.rotate(-self._random.randrange(len(self)))
        handle = super().popleft()
        process = handle._context.get(PROCESS)
        if process is not None and not process.alive:
            handle.cancel()  # the loop passes over what is cancelled
        return handle


class _Selector(selectors.SelectSelector):
    """Nothing is waited for: time jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("everything waits, and nothing will happen")
        self.now += max(timeout, 0.0)
        return []


class DeadlockError(Exception):
    """No callback is ready and no timer is set."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Virtual time: it passes only while nothing can run."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class SeededLoop(VirtualLoop):
    """Virtual time, and an order of callbacks that follows from the seed."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._ready = _Ready(random)


def run(random: Random, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run a world to its end.

    What killed processes had is collected after it: their `finally` blocks would run on the loop of another world.
    """
    loop = SeededLoop(random)
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(lambda *_: None)
    gc.disable()
    try:
        loop.run_until_complete(work())
    finally:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False
        asyncio.set_event_loop(None)
        loop.close()
        gc.enable()

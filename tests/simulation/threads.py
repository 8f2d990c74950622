"""Threads of simulated processes: real ones, of which one runs at a time, when the seed says so.

A thread runs while the loop waits for it, until it pauses: where it waits for its queue, and where its work takes time.
So what it and the loop do alternates in an order that follows from the seed.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any


class KilledError(BaseException):
    """The thread's process was killed: nothing of the thread runs any more, except what unwinds it."""


class VirtualThread:
    """A thread that runs when the loop lets it.

    Args:
        target: what it does.
        random: the world's.
        mean: seconds, on average, until it runs after it could.
    """

    def __init__(self, target: Callable[[], object], random: Random, mean: float) -> None:
        self._target = target
        self._random = random
        self._mean = mean
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._pause: float | None = None
        self._woken = False
        self.ended = False
        self.killed = False
        self._thread.start()
        self.wake()

    def wake(self, seconds: float | None = None) -> None:
        """Let it run after this time, or after a time that is drawn."""
        if not self._woken:
            self._woken = True
            delay = self._random.expovariate(1 / self._mean) if seconds is None else seconds
            self._loop.call_later(delay, self._run)

    def pause(self, seconds: float | None) -> None:
        """Called in the thread: stop for this time, or until `wake`. Raises `KilledError` if it was killed."""
        self._pause = seconds
        self._paused.release()
        self._go.acquire()
        if self.killed:
            raise KilledError

    def kill(self) -> None:
        """End it; nothing that it does from now on is seen."""
        if not self.ended:
            self.killed = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        if self.ended:
            return
        self._woken = False
        self._pause = None
        self._go.release()
        self._paused.acquire()
        if not self.ended and self._pause is not None:
            self.wake(self._pause)

    def _main(self) -> None:
        self._go.acquire()
        asyncio._set_running_loop(self._loop)  # for its clock: the loop waits for this thread
        try:
            if not self.killed:
                self._context.run(self._target)
        except KilledError:
            pass
        finally:
            self.ended = True
            self._paused.release()


class VirtualQueue:
    """Takes the place of `SimpleQueue` between the loop and a `VirtualThread`."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self.thread: VirtualThread | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self.thread is not None:
            self.thread.wake()

    def get(self) -> Any:
        assert self.thread is not None
        while not self._items:
            self.thread.pause(None)
        return self._items.popleft()

    get_nowait = get

    def empty(self) -> bool:
        return not self._items

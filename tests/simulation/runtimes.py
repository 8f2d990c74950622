"""Clock, chance, tasks and threads of the simulated processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from random import Random
from typing import Any

from batchnorm_client.core.runtime import AsyncRuntime
from batchnorm_service.runtime import Runtime
from simulation.threads import VirtualQueue, VirtualThread

EPOCH = 1_700_000_000.0
"""The wall clock when a world begins."""


class ServiceRuntime(Runtime):
    """A replica's.

    Args:
        random: the world's.
        skew: seconds that its wall clock is ahead; faults change it.
    """

    def __init__(self, random: Random, skew: float = 0.0) -> None:
        self._random = random
        self.skew = skew
        self.now = lambda: asyncio.get_running_loop().time()
        self.wall = lambda: EPOCH + self.skew + asyncio.get_running_loop().time()
        self.bits = random.getrandbits
        self.bytes = random.randbytes
        self._queue: VirtualQueue | None = None
        self._thread: VirtualThread | None = None

    @property
    def thread_is_killed(self) -> bool:
        """Whether its thread only unwinds."""
        return self._thread is not None and self._thread.killed

    def queue(self) -> Any:
        """A queue for the thread that is started next."""
        self._queue = VirtualQueue()
        return self._queue

    def thread(self, target: Callable[[], object], name: str) -> None:
        """Start the process's thread; of the simulated processes, each has at most one."""
        self._thread = VirtualThread(target, self._random, 0.0005)
        if self._queue is not None:
            self._queue.thread = self._thread

    def pause_thread(self, seconds: float) -> None:
        """Called in the thread."""
        assert self._thread is not None
        self._thread.pause(seconds)

    def kill_thread(self) -> None:
        """With its process."""
        if self._thread is not None:
            self._thread.kill()

    async def in_thread(self, executor: Executor | None, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A thread takes time, before and after."""
        await asyncio.sleep(self._random.expovariate(1000))
        result = function(*args, **kwargs)
        await asyncio.sleep(self._random.expovariate(1000))
        return result


class ClientRuntime(AsyncRuntime):
    """A client's.

    Attributes:
        forks: what must be done anew in a child process.
        exits: what is called when the process exits.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self.forks: list[Any] = []
        self.exits: list[Callable[[], None]] = []

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def date(self) -> float:
        return EPOCH + asyncio.get_running_loop().time()

    def random(self) -> float:
        return self._random.random()

    def key(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def run(self, function: Callable[[], Any]) -> Any:
        return function()

    def watch_forks(self, user: Any) -> None:
        self.forks.append(user)

    def at_exit(self, function: Callable[[], None]) -> Callable[[], object]:
        self.exits.append(function)
        return lambda: self.exits.remove(function)

"""Clock, random numbers, sleep, threads and tasks of a client.

Nothing else in `core` uses the system's, so that a simulation can replace them.
"""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakSet

from batchnorm_client.wire.errors import BatchNormError

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


class Forks(Protocol):
    """What must be done anew in a child process."""

    def forked(self) -> None:
        """Called in the child, before anything else runs there."""


_forks: WeakSet[Forks] = WeakSet()


def _forked() -> None:
    for each in list(_forks):
        each.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Signal:
    """Something has changed: threads wait for it. None is missed by who reads `number` before it looks."""

    def __init__(self) -> None:
        self.number = 0
        self._condition = threading.Condition()

    def notify(self) -> None:
        """Wake all who wait."""
        with self._condition:
            self.number += 1
            self._condition.notify_all()

    def wait(self, seen: int, seconds: float | None) -> None:
        """Return when `number` is no longer the one that was seen, or after this time."""
        with self._condition:
            self._condition.wait_for(lambda: self.number != seen, seconds)


class AsyncSignal:
    """The same for the tasks of an event loop."""

    def __init__(self) -> None:
        self.number = 0
        self._waiting: dict[asyncio.Future[None], None] = {}  # they are woken in this order

    def notify(self) -> None:
        """Wake all who wait."""
        self.number += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seen: int, seconds: float | None) -> None:
        """Return when `number` is no longer the one that was seen, or after this time."""
        import asyncio  # noqa: PLC0415

        if self.number == seen:
            future = asyncio.get_running_loop().create_future()
            self._waiting[future] = None
            try:
                await asyncio.wait([future], timeout=seconds)
            finally:
                del self._waiting[future]


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

    def watch_forks(self, user: Forks) -> None:
        """Call `user.forked()` in each child process, as long as it is in use."""
        _forks.add(user)

    def at_exit(self, function: Callable[[], None]) -> Callable[[], object]:
        """Call a function when the process exits, also one of `multiprocessing`. Returns what takes it back."""
        from multiprocessing import util  # noqa: PLC0415 - atexit does not run in its processes

        return util.Finalize(None, function, exitpriority=0).cancel


class SyncRuntime(Runtime):
    """The runtime of `Client`."""

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def run(self, function: Callable[[], T]) -> T:
        """Compute, in the calling thread."""
        return function()

    def lock(self) -> AbstractContextManager[object]:
        """A new lock."""
        return threading.Lock()

    def signal(self) -> Signal:
        """A new signal."""
        return Signal()

    def spawn(self, function: Callable[[], None]) -> threading.Thread:
        """Run in a thread, which does not keep the process from exiting."""
        thread = threading.Thread(target=function, name="batchnorm-follower", daemon=True)
        thread.start()
        return thread

    def end(self, _spawned: threading.Thread) -> None:
        """A thread ends by itself."""

    def at_last(self, function: Callable[[], None]) -> None:
        """Do this before the process exits; what it raises of this package's is left to who looks afterwards."""
        with suppress(BatchNormError):
            function()


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

    def lock(self) -> AbstractContextManager[object]:
        """Nothing: tasks take turns where they await."""
        return nullcontext()

    def signal(self) -> AsyncSignal:
        """A new signal."""
        return AsyncSignal()

    def spawn(self, function: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run in a task of asyncio's."""
        import asyncio  # noqa: PLC0415

        return asyncio.ensure_future(function())

    async def end(self, spawned: asyncio.Task[None]) -> None:
        """Cancel a task."""
        import asyncio  # noqa: PLC0415

        spawned.cancel()
        await asyncio.wait([spawned])

    def at_last(self, function: Callable[[], Awaitable[None]]) -> None:
        """Nothing: when the process exits, there is no event loop any more."""

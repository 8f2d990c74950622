"""Clock, random numbers and concurrency for `layers` and `store`, replaceable by a simulation.

No module there calls `time`, `random`, `asyncio.sleep` or the like (`tests/test_seams.py`), so that a simulation can
control the time, the order of tasks, and the random numbers.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Runtime:
    """Clock, random numbers and concurrency of the real system."""

    now: Callable[[], float] = staticmethod(time.monotonic)
    """Seconds of a monotonic clock."""

    wall: Callable[[], float] = staticmethod(time.time)
    """Seconds since the epoch by the system's clock, which may jump."""

    bits: Callable[[int], int] = staticmethod(secrets.randbits)
    """Random bits from the system: those of `random` would repeat in a cloned virtual machine."""

    bytes: Callable[[int], bytes] = staticmethod(random.randbytes)
    """Random bytes, fast but not cryptographically secure."""

    def create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task."""
        return asyncio.get_running_loop().create_task(coroutine)

    def future(self) -> asyncio.Future[Any]:
        """A future of the running event loop."""
        return asyncio.get_running_loop().create_future()

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Call a function after this time, unless the handle is cancelled."""
        return asyncio.get_running_loop().call_later(seconds, callback, *args)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """A context manager that cancels its body after this time and raises `TimeoutError`."""
        return asyncio.timeout(seconds)

    async def in_thread(
        self, executor: Executor | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function in a thread of the executor."""
        return await asyncio.get_running_loop().run_in_executor(executor, partial(function, *args, **kwargs))

    def thread(self, target: Callable[[], object], name: str) -> None:
        """Start a daemon thread."""
        threading.Thread(target=target, name=name, daemon=True).start()

    def queue(self) -> SimpleQueue[Any]:
        """A queue for a thread that `thread` starts."""
        return SimpleQueue()

    def pause_thread(self, seconds: float) -> None:
        """Block the calling thread, which has no event loop."""
        time.sleep(seconds)


RUNTIME: Final = Runtime()

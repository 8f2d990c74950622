"""The clock, chance and concurrency, as `layers` and `store` see them: a simulation brings its own.

No module there calls `time`, `random`, `asyncio.sleep` or the like (`tests/test_seams.py`): whoever owns the runtime
decides what time it is, which task goes on next, and which random numbers come.
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
from typing import Any, Final, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Runtime:
    """The real one."""

    now: Callable[[], float] = staticmethod(time.monotonic)
    """Seconds of a clock that never goes back."""

    wall: Callable[[], float] = staticmethod(time.time)
    """Seconds since 1970 in UTC, as the machine's clock has it, which may be set."""

    bits: Callable[[int], int] = staticmethod(secrets.randbits)
    """So many random bits of the system's: those of `random` would come again in a copy of a virtual machine."""

    bytes: Callable[[int], bytes] = staticmethod(random.randbytes)
    """So many random bytes, quickly: never the same twice, but not hard to guess."""

    def create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine beside the others."""
        return asyncio.get_running_loop().create_task(coroutine)

    def future(self) -> asyncio.Future[Any]:
        """A future of the running loop."""
        return asyncio.get_running_loop().create_future()

    async def sleep(self, seconds: float) -> None:
        """Return after this time."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """A context whose body is cut off after this time, with `TimeoutError`."""
        return asyncio.timeout(seconds)

    async def in_thread(
        self, executor: Executor | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(executor, partial(function, *args, **kwargs))

    def thread(self, target: Callable[[], object], name: str) -> None:
        """Start a thread that does not keep the process from ending."""
        threading.Thread(target=target, name=name, daemon=True).start()

    def pause_thread(self, seconds: float) -> None:
        """Let the calling thread, which has no event loop, wait for so long."""
        time.sleep(seconds)


RUNTIME: Final = Runtime()

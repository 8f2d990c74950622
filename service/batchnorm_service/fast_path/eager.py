"""Starting a coroutine where it is called: one that waits for nothing is done without a task.

Python 3.12 has `asyncio.Task(eager_start=True)`. Here the first step is taken by hand: it costs 0.3 µs for a coroutine
that is done then, and 3.4 µs for one that waits, where a task costs 1.9 µs. Nothing before the first suspension may ask
for the current task, as `asyncio.timeout` does: there is none yet.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Task
from collections.abc import Coroutine, Generator
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")


def start(coroutine: Coroutine[Any, Any, T], loop: AbstractEventLoop) -> T | Task[T]:
    """What the coroutine returns, if it waits for nothing, otherwise a task for the rest of it. Raises as it does."""
    context = copy_context()
    try:
        awaited = context.run(coroutine.send, None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    return loop.create_task(_Started(coroutine, awaited), context=context)


class _Started(Coroutine[Any, Any, T]):
    """A coroutine that was stepped to its first suspension, as a task that has not been there."""

    __slots__ = ("_awaited", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, T], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited

    def send(self, value: Any) -> Any:
        if self._awaited is not None:
            awaited, self._awaited = self._awaited, None
            return awaited
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self._awaited = None
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise NotImplementedError("it is given to a task, and to nobody else")

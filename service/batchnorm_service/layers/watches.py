"""Calls that wait until layers change, grouped by what they wait for: one read serves all calls of a group.

A commit of this process wakes the groups of its layer. Other processes write to a shared store, too: as long as calls
wait there, one task reads what each group waits for at intervals, whatever the number of calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from batchnorm_client.wire.errors import Overloaded, StoreUnavailable

from ..runtime import Runtime
from ..store.base import Store
from .layer_states import LayerStates

MIN_PAUSE: Final = 0.05
"""Seconds between two checks of a shared store; up to `_MAX_PAUSE` if a check takes long, so that it uses a fifth of
the time."""

_MAX_PAUSE: Final = 1.0
_BUSY_FACTOR: Final = 4
_MAX_NAMES: Final = 100
"""How many names there may be for each of the calls that may wait: the groups take memory by their names."""


class Selection(NamedTuple):
    """Several layers: those of these names, or all whose names start with a prefix.

    Attributes:
        names: ascending, each once; empty if there is a prefix.
        prefix: not empty if there are no names.
    """

    names: tuple[str, ...] = ()
    prefix: str = ""


class Watch:
    """The calls that wait for one selection.

    Attributes:
        changes: how many changes of its layers were reported. A call that reads the layers and then waits compares it,
            so that it misses no change in between.
        users: how many calls have entered.
        tags: of the last states that were read; None if they may have changed since.
    """

    def __init__(self, selection: Selection, read: Callable[[Selection], Awaitable[LayerStates]], runtime: Runtime):
        self.selection = selection
        self.changes = 0
        self.users = 0
        self.tags: tuple[str, ...] | None = None
        self._read = read
        self._runtime = runtime
        self._waiting: dict[asyncio.Future[LayerStates | None], tuple[str, ...]] = {}
        self._task: asyncio.Task[None] | None = None
        self._failure: StoreUnavailable | None = None

    async def read(self) -> LayerStates:
        """The newest states. Raises what reading them raises."""
        changes = self.changes
        states = await self._read(self.selection)
        if changes == self.changes:
            self.tags = states.tags
        return states

    def changed(self) -> None:
        """A layer may have changed: read it, and wake the calls that know another state."""
        self.changes += 1
        self.tags = None
        self.check()

    def check(self) -> None:
        """Start to read, unless that goes on, and wake the calls that know another state."""
        if self._waiting and self._task is None:
            self._task = self._runtime.create_task(self._wake())

    async def checked(self) -> None:
        """Return when no check goes on."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def wait(self, tags: tuple[str, ...], seconds: float) -> LayerStates | None:
        """The first states found to have other tags; None when the time is over, or the server stops.

        Raises:
            StoreUnavailable: the time is over, and the last check failed.
            ProblemError: a layer is gone.
        """
        future: asyncio.Future[LayerStates | None] = self._runtime.future()
        self._waiting[future] = tags
        # A timer, because a timeout needs a current task, and a call that is started eagerly has none yet.
        timer = self._runtime.call_later(seconds, self._end_wait, future)
        try:
            return await future
        finally:
            timer.cancel()
            self._waiting.pop(future, None)

    def end(self) -> None:
        """End all waits without a result."""
        for future in [*self._waiting]:
            self._settle(future, None)

    def _end_wait(self, future: asyncio.Future[LayerStates | None]) -> None:
        """The time of a wait is over."""
        if future in self._waiting:
            self._settle(future, self._failure)

    async def _wake(self) -> None:
        try:
            while self._waiting:
                changes = self.changes
                self._deliver(await self._read_or_error())
                if changes == self.changes:
                    return
        finally:
            self._task = None

    async def _read_or_error(self) -> LayerStates | Exception | None:
        try:
            states = await self.read()
        except StoreUnavailable as error:
            self._failure = error  # the store may answer before the calls' time is over
            return None
        except Exception as error:
            return error
        self._failure = None
        return states

    def _deliver(self, found: LayerStates | Exception | None) -> None:
        if found is not None:
            for future, tags in [*self._waiting.items()]:
                if isinstance(found, Exception) or found.tags != tags:
                    self._settle(future, found)

    def _settle(self, future: asyncio.Future[LayerStates | None], result: LayerStates | Exception | None) -> None:
        del self._waiting[future]
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


class Watches:
    """All watches of a process, by selection and by what a change of a layer concerns.

    Args:
        store: checked at intervals if others can write to it.
        read: reads the states of a selection.
        limit: how many calls may wait.
        runtime: tasks, timeouts.

    Attributes:
        waiting: how many calls wait now.
    """

    def __init__(
        self, store: Store, read: Callable[[Selection], Awaitable[LayerStates]], limit: int, runtime: Runtime
    ) -> None:
        self.waiting = 0
        self._store = store
        self._read = read
        self._limit = limit
        self._runtime = runtime
        self._watches: dict[Selection, Watch] = {}
        self._by_name: dict[str, set[Watch]] = {}
        self._by_prefix: dict[str, Watch] = {}
        self._names = 0
        self._checks: asyncio.Task[None] | None = None
        self._stopped = False

    def changed(self, name: str) -> None:
        """A layer was created, deleted or committed, or may have been."""
        if not self._watches:
            return
        for watch in [*self._by_name.get(name, ())]:
            watch.changed()
        if self._by_prefix:
            for end in range(1, len(name) + 1):
                if watch := self._by_prefix.get(name[:end]):
                    watch.changed()

    def stop(self) -> None:
        """The server stops: end all waits, and let none begin."""
        self._stopped = True
        for watch in self._watches.values():
            watch.end()

    async def closed(self) -> None:
        """Stop, and return when nothing is read any more."""
        self.stop()
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.wait([self._checks])
        for watch in [*self._watches.values()]:
            await watch.checked()

    async def wait(self, watch: Watch, tags: tuple[str, ...], seconds: float) -> LayerStates | None:
        """As `Watch.wait`. Raises `Overloaded` if too many calls wait."""
        if self._stopped:
            return None
        if self.waiting >= self._limit:
            raise _overloaded(f"{self.waiting} calls are waiting")
        if not self._store.exclusive and self._checks is None:
            self._checks = self._runtime.create_task(self._check_regularly())
        self.waiting += 1
        try:
            return await watch.wait(tags, seconds)
        finally:
            self.waiting -= 1

    @contextmanager
    def use(self, selection: Selection) -> Iterator[Watch]:
        """The watch of a selection, told of all changes while it is in use. Raises `Overloaded`."""
        watch = self._watches.get(selection) or self._add(selection)
        watch.users += 1
        try:
            yield watch
        finally:
            watch.users -= 1
            if not watch.users:
                self._remove(watch)

    def _add(self, selection: Selection) -> Watch:
        if self._names + len(selection.names) > _MAX_NAMES * self._limit:
            raise _overloaded(f"calls are waiting for {self._names} layers")
        self._names += len(selection.names)
        watch = self._watches[selection] = Watch(selection, self._read, self._runtime)
        for name in selection.names:
            self._by_name.setdefault(name, set()).add(watch)
        if selection.prefix:
            self._by_prefix[selection.prefix] = watch
        return watch

    def _remove(self, watch: Watch) -> None:
        selection = watch.selection
        del self._watches[selection]
        self._names -= len(selection.names)
        for name in selection.names:
            self._by_name[name].discard(watch)
            if not self._by_name[name]:
                del self._by_name[name]
        self._by_prefix.pop(selection.prefix, None)

    async def _check_regularly(self) -> None:
        try:
            pause = MIN_PAUSE
            while self.waiting:
                await self._runtime.sleep(pause)
                began = self._runtime.now()
                for watch in [*self._watches.values()]:
                    watch.check()
                for watch in [*self._watches.values()]:
                    await watch.checked()
                pause = min(_MAX_PAUSE, max(MIN_PAUSE, _BUSY_FACTOR * (self._runtime.now() - began)))
        finally:
            self._checks = None


def _overloaded(what: str) -> Overloaded:
    return Overloaded(f"{what}: BATCHNORM_MAX_WAITING_CALLS", retry_after=1)

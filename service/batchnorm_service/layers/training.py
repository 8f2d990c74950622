"""A small call between its batch and its commit: it waits as a future in the layer's queue, without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from ..engine.normalize import TrainStep, named_statistics
from ..engine.tensors import to_wire
from .moments_source import BatchSource
from .results import Folded, Normalized
from .updates import Done, ReplacedError

T_co = TypeVar("T_co", covariant=True)


class Waiting(Protocol[T_co]):
    """A call whose fold waits in the queue."""

    @property
    def folded(self) -> asyncio.Future[Done]:
        """Done when the fold is durable or refused. Cancelling it is the caller's going away."""
        ...

    def result(self) -> T_co | None:
        """What came of it once `folded` is done; None when more is to be done: `rest`. Raises as the call does."""
        ...

    async def rest(self) -> T_co:
        """The same where the layer has been changed or replaced meanwhile."""
        ...


class Training:
    """A batch that is normalized, and whose fold waits. See `Waiting`."""

    __slots__ = ("_again", "_source", "folded")

    def __init__(
        self, folded: asyncio.Future[Done], source: BatchSource, again: Callable[[], Coroutine[Any, Any, Normalized]]
    ) -> None:
        self.folded = folded
        self._source = source
        self._again = again

    def result(self) -> Normalized | None:
        """See `Waiting`."""
        try:
            done = self.folded.result()
        except ReplacedError:
            return None
        step = self._source.step_under(done.layer.state)
        return None if step is None else normalized(step, done)

    async def rest(self) -> Normalized:
        """See `Waiting`."""
        try:
            done = self.folded.result()
        except ReplacedError:
            return await self._again()
        return normalized(await self._source.output(done.layer.state), done)


class Posting:
    """Moments that a caller sent, and whose fold waits. See `Waiting`."""

    __slots__ = ("_again", "folded")

    def __init__(self, folded: asyncio.Future[Done], again: Callable[[], Coroutine[Any, Any, Folded]]) -> None:
        self.folded = folded
        self._again = again

    def result(self) -> Folded | None:
        """See `Waiting`."""
        try:
            done = self.folded.result()
        except ReplacedError:
            return None
        return Folded(done.version, done.batch, done.replayed)

    async def rest(self) -> Folded:
        """See `Waiting`."""
        return await self._again()


def normalized(step: TrainStep, done: Done, *, statistics: bool = False) -> Normalized:
    """The answer to a train call."""
    named = named_statistics(step) if statistics else {}
    tensors = {name: to_wire(tensor) for name, tensor in named.items()}
    return Normalized(to_wire(step.output), done.version, done.batch, done.replayed, tensors)

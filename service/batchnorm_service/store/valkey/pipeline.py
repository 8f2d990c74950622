"""A connection that many calls share, and the round trips they share on it.

Calls that wait at the same moment are sent together and answered together. With `replicas` the round ends with a
WAIT on the same connection, so one WAIT serves every call of the round. The task that does this belongs to no
caller: a caller that is cancelled leaves the connection as it should be.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from valkey.exceptions import ReadOnlyError, ResponseError

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError, StoreRefusedError
from batchnorm_service.store.valkey.connection import Command, ServerConnection, in_words
from batchnorm_service.store.valkey.scripts import Script

_MOST_JOBS: Final = 128  # in one round
_MOST_BYTES: Final = 1 << 20  # in one round, unless a single job has more


class UnsentError(StoreError):
    """The server cannot be reached: nothing was sent."""


class LostError(StoreError):
    """The answer was lost, and with it whether the call took effect."""


@dataclass(frozen=True, slots=True)
class Job:
    """A script to run.

    Attributes:
        script: what to run.
        bucket: whose keys it uses.
        keys: the first is the one it is about.
        args: its other arguments.
        asking: the bucket is on its way to the server that is asked.
        whole: send the script, not only its digest.
    """

    script: Script
    bucket: int
    keys: Sequence[bytes]
    args: Sequence[bytes | int] = ()
    asking: bool = False
    whole: bool = False

    @property
    def command(self) -> Command:
        """To be sent."""
        name, script = (b"EVAL", self.script.source) if self.whole else (b"EVALSHA", self.script.digest)
        return (name, script, len(self.keys), *self.keys, *self.args)

    @property
    def size(self) -> int:
        """About as many bytes are sent."""
        return sum(len(arg) for arg in self.args if isinstance(arg, bytes)) + 64 * len(self.keys)


@dataclass(slots=True, eq=False)
class Waiting:
    """A job, its caller, and whether the server has yet to say something about it."""

    job: Job
    answer: asyncio.Future[Any]
    unanswered: bool = True

    def settle(self, reply: Any) -> None:
        """Answer, if anybody still waits."""
        if not self.answer.done():
            self.answer.set_result(reply)

    def fail(self, error: Exception) -> None:
        """Answer with an error."""
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, and how many replicas must have a write before it is acknowledged.

    Attributes:
        timeout: seconds for one round.
        replicas: 0: none, and no WAIT is sent.
        wait_timeout: seconds that a WAIT may take.
    """

    timeout: float
    replicas: int
    wait_timeout: float


class Pipeline:
    """Jobs for one server, one round after the other.

    Args:
        connect: connects.
        limits: see there.
    """

    def __init__(self, connect: Callable[[], Awaitable[ServerConnection]], limits: Limits, runtime: Runtime) -> None:
        self._runtime = runtime
        self._connect = connect
        self._limits = limits
        self._queue: deque[Waiting] = deque()
        self._writing: Counter[bytes] = Counter()
        self._connection: ServerConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def submit(self, job: Job) -> asyncio.Future[Any]:
        """Queue a job. The future holds the reply, a `ResponseError` or a `StoreError`."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._closed:
            answer.set_exception(UnsentError("the Valkey store is closed"))
            return answer
        if job.script.writes:
            self._writing[job.keys[0]] += 1
        self._queue.append(Waiting(job, answer))
        if self._task is None:
            self._task = self._runtime.create_task(self._drain())
        return answer

    def writing(self, key: bytes) -> bool:
        """Whether a script that may change `key` has not been answered by the server yet."""
        return key in self._writing

    async def close(self) -> None:
        """Do what is queued, then disconnect."""
        self._closed = True
        while self._task is not None:
            await asyncio.wait([self._task])
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

    async def _drain(self) -> None:
        try:
            # While nobody used it, the connection may have been closed by the server or by something on the way.
            if self._connection is not None and await self._connection.hung_up():
                await self._drop()
            while self._queue:
                if jobs := list(self._take()):
                    await self._round(jobs)
        finally:
            self._task = None

    def _take(self) -> Iterator[Waiting]:
        """What goes into the next round: not those that were cancelled before they were sent."""
        size = 0
        for count in range(_MOST_JOBS):
            if not self._queue or (count and size + self._queue[0].job.size > _MOST_BYTES):
                return
            waiting = self._queue.popleft()
            if waiting.answer.cancelled():
                self._answered(waiting)
            else:
                size += waiting.job.size
                yield waiting

    async def _round(self, jobs: list[Waiting]) -> None:
        try:
            connection = self._connection = self._connection or await self._connect()
        except Exception as error:
            # Each try may take long: fail all that wait for this one.
            jobs += self._queue
            self._queue.clear()
            self._fail(jobs, UnsentError, error)
            return
        waits = self._limits.replicas > 0 and any(waiting.job.script.writes for waiting in jobs)
        try:
            async with self._runtime.timeout(self._limits.timeout + (self._limits.wait_timeout if waits else 0)):
                await connection.send(self._commands(jobs, waits=waits))
                await self._collect(connection, jobs, waits=waits)
        except Exception as error:
            await self._drop()
            self._fail(jobs, LostError, error)

    def _commands(self, jobs: Sequence[Waiting], *, waits: bool) -> Iterator[Command]:
        for waiting in jobs:
            if waiting.job.asking:
                yield (b"ASKING",)
            yield waiting.job.command
        if waits:
            yield (b"WAIT", self._limits.replicas, max(round(1000 * self._limits.wait_timeout), 1))

    async def _collect(self, connection: ServerConnection, jobs: Sequence[Waiting], *, waits: bool) -> None:
        held: list[tuple[Waiting, Any]] = []
        demoted = False
        for waiting in jobs:
            if waiting.job.asking:
                await connection.reply()
            try:
                reply = await connection.reply()
            except ResponseError as error:
                demoted = demoted or isinstance(error, ReadOnlyError)
                waiting.fail(error)
            else:
                if waits and waiting.job.script.writes:
                    held.append((waiting, reply))
                else:
                    waiting.settle(reply)
            self._answered(waiting)
        if waits:
            await self._wait(connection, held)
        if demoted:  # the host's name may mean another server by now
            await self._drop()

    async def _wait(self, connection: ServerConnection, held: Sequence[tuple[Waiting, Any]]) -> None:
        fault = ""
        try:
            count = await connection.reply()
        except ResponseError as error:
            fault = f"WAIT: {in_words(error)}"
        else:
            if count < self._limits.replicas:
                fault = f"{count} of {self._limits.replicas} replicas have it after {self._limits.wait_timeout:g} s"
        for waiting, reply in held:
            if fault:
                waiting.fail(StoreError(f"written, but not acknowledged by the replicas: {fault}"))
            else:
                waiting.settle(reply)

    def _answered(self, waiting: Waiting) -> None:
        if waiting.unanswered and waiting.job.script.writes:
            key = waiting.job.keys[0]
            self._writing[key] -= 1
            if self._writing[key] <= 0:
                del self._writing[key]
        waiting.unanswered = False

    def _fail(self, jobs: Sequence[Waiting], kind: type[StoreError], reason: Exception) -> None:
        words = str(reason) if isinstance(reason, StoreRefusedError) else in_words(reason)
        for waiting in jobs:  # each its own exception: a shared one would gather the tracebacks of all who raise it
            waiting.fail(kind(words))
            self._answered(waiting)

    async def _drop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.drop()

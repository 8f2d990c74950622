"""Pipelining: calls that are queued at the same time share one round trip on one connection.

With `replicas`, a round ends with one WAIT for all of its calls. A task of the pipeline does the rounds, so cancelling
a caller does not disturb the connection.
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
from batchnorm_service.store.valkey.connection import Command, ServerConnection, describe_error
from batchnorm_service.store.valkey.scripts import Script

_MAX_CALLS: Final = 128  # in one round
_MAX_BYTES: Final = 1 << 20  # in one round, unless a single call has more


class UnsentError(StoreError):
    """The server cannot be reached: nothing was sent."""


class LostError(StoreError):
    """The reply was lost: the call's outcome is unknown."""


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """A call of a script.

    Attributes:
        script: the script.
        bucket: the bucket of its keys.
        keys: the script's keys; calls are ordered by the first.
        args: the script's other arguments.
        asking: send ASKING first: the bucket is being migrated to this server.
        full_source: send the script's source, not only its digest.
    """

    script: Script
    bucket: int
    keys: Sequence[bytes]
    args: Sequence[bytes | int] = ()
    asking: bool = False
    full_source: bool = False

    @property
    def command(self) -> Command:
        """The command to send."""
        name, script = (b"EVAL", self.script.source) if self.full_source else (b"EVALSHA", self.script.digest)
        return (name, script, len(self.keys), *self.keys, *self.args)

    @property
    def size(self) -> int:
        """The approximate size of the command in bytes."""
        return sum(len(arg) for arg in self.args if isinstance(arg, bytes)) + 64 * len(self.keys)


@dataclass(slots=True, eq=False)
class PendingCall:
    """A queued or sent call, the future of its caller, and whether the server's reply is outstanding."""

    call: ScriptCall
    future: asyncio.Future[Any]
    unreplied: bool = True

    def settle(self, reply: Any) -> None:
        """Set the result, unless the caller was cancelled."""
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: Exception) -> None:
        """Set an exception, unless the caller was cancelled."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Limits:
    """Timeouts, and the number of replicas to wait for.

    Attributes:
        timeout: seconds for one round.
        replicas: how many replicas must have a write before it is acknowledged; with 0, no WAIT is sent.
        wait_timeout: seconds for a WAIT.
    """

    timeout: float
    replicas: int
    wait_timeout: float


class Pipeline:
    """Queue of calls to one server, sent in rounds over one connection.

    Args:
        connect: opens the connection.
        limits: timeouts and replicas.
        runtime: clock and tasks.
    """

    def __init__(self, connect: Callable[[], Awaitable[ServerConnection]], limits: Limits, runtime: Runtime) -> None:
        self._runtime = runtime
        self._connect = connect
        self._limits = limits
        self._queue: deque[PendingCall] = deque()
        self._writing: Counter[bytes] = Counter()
        self._connection: ServerConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def submit(self, call: ScriptCall) -> asyncio.Future[Any]:
        """Queue a call. The future gets the reply, or raises `ResponseError` or `StoreError`."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(UnsentError("the Valkey store is closed"))
            return future
        if call.script.writes:
            self._writing[call.keys[0]] += 1
        self._queue.append(PendingCall(call, future))
        if self._task is None:
            self._task = self._runtime.create_task(self._drain())
        return future

    def writing(self, key: bytes) -> bool:
        """Whether the reply to a script that may change `key` is outstanding."""
        return key in self._writing

    async def close(self) -> None:
        """Finish queued calls, then disconnect."""
        self._closed = True
        while self._task is not None:
            await asyncio.wait([self._task])
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

    async def _drain(self) -> None:
        try:
            # An idle connection may have been closed by the server or by a network device.
            if self._connection is not None and await self._connection.is_closed():
                await self._drop()
            while self._queue:
                if calls := list(self._take()):
                    await self._round(calls)
        finally:
            self._task = None

    def _take(self) -> Iterator[PendingCall]:
        """The calls of the next round, without those that were cancelled."""
        size = 0
        for count in range(_MAX_CALLS):
            if not self._queue or (count and size + self._queue[0].call.size > _MAX_BYTES):
                return
            pending = self._queue.popleft()
            if pending.future.cancelled():
                self._finish_write(pending)
            else:
                size += pending.call.size
                yield pending

    async def _round(self, calls: list[PendingCall]) -> None:
        try:
            connection = self._connection = self._connection or await self._connect()
        except Exception as error:
            # Connecting may take long: fail all queued calls instead of retrying for each.
            calls += self._queue
            self._queue.clear()
            self._fail(calls, UnsentError, error)
            return
        waits = self._limits.replicas > 0 and any(pending.call.script.writes for pending in calls)
        try:
            async with self._runtime.timeout(self._limits.timeout + (self._limits.wait_timeout if waits else 0)):
                await connection.send(self._commands(calls, waits=waits))
                await self._collect(connection, calls, waits=waits)
        except Exception as error:
            await self._drop()
            self._fail(calls, LostError, error)

    def _commands(self, calls: Sequence[PendingCall], *, waits: bool) -> Iterator[Command]:
        for pending in calls:
            if pending.call.asking:
                yield (b"ASKING",)
            yield pending.call.command
        if waits:
            yield (b"WAIT", self._limits.replicas, max(round(1000 * self._limits.wait_timeout), 1))

    async def _collect(self, connection: ServerConnection, calls: Sequence[PendingCall], *, waits: bool) -> None:
        held: list[tuple[PendingCall, Any]] = []
        demoted = False
        for pending in calls:
            if pending.call.asking:
                await connection.read_reply()
            try:
                reply = await connection.read_reply()
            except ResponseError as error:
                demoted = demoted or isinstance(error, ReadOnlyError)
                pending.fail(error)
            else:
                if waits and pending.call.script.writes:
                    held.append((pending, reply))
                else:
                    pending.settle(reply)
            self._finish_write(pending)
        if waits:
            await self._wait(connection, held)
        if demoted:  # reconnect: the host name may now resolve to another server
            await self._drop()

    async def _wait(self, connection: ServerConnection, held: Sequence[tuple[PendingCall, Any]]) -> None:
        fault = ""
        try:
            count = await connection.read_reply()
        except ResponseError as error:
            fault = f"WAIT: {describe_error(error)}"
        else:
            if count < self._limits.replicas:
                fault = f"{count} of {self._limits.replicas} replicas have it after {self._limits.wait_timeout:g} s"
        for pending, reply in held:
            if fault:
                pending.fail(StoreError(f"written, but not acknowledged by the replicas: {fault}"))
            else:
                pending.settle(reply)

    def _finish_write(self, pending: PendingCall) -> None:
        if pending.unreplied and pending.call.script.writes:
            key = pending.call.keys[0]
            self._writing[key] -= 1
            if self._writing[key] <= 0:
                del self._writing[key]
        pending.unreplied = False

    def _fail(self, calls: Sequence[PendingCall], kind: type[StoreError], reason: Exception) -> None:
        message = str(reason) if isinstance(reason, StoreRefusedError) else describe_error(reason)
        for pending in calls:  # each its own exception: a shared one would accumulate the tracebacks of all callers
            pending.fail(kind(message))
            self._finish_write(pending)

    async def _drop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.drop()

"""Runs scripts on the server that owns their bucket: redirections, NOSCRIPT, and retries."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from valkey.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, ResponseError, TryAgainError

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.valkey.address import Node
from batchnorm_service.store.valkey.connection import describe_error
from batchnorm_service.store.valkey.pipeline import LostError, ScriptCall, UnsentError
from batchnorm_service.store.valkey.scripts import Script
from batchnorm_service.store.valkey.topology import ClusterTopology

_PAUSE: Final = 0.02  # seconds between retries while a bucket is being migrated to another server
_MAX_REDIRECTIONS: Final = 16


class CommandRunner:
    """Runner of scripts.

    Args:
        topology: the owners of the buckets, and their pipelines.
        timeout: seconds for which a call is retried while its bucket is being migrated.
        runtime: clock.
    """

    def __init__(self, topology: ClusterTopology, timeout: float, runtime: Runtime) -> None:
        self._runtime = runtime
        self._topology = topology
        self._timeout = timeout
        self._running = 0
        self._ended = asyncio.Event()

    def run(
        self, script: Script, bucket: int, keys: Sequence[bytes], args: Sequence[bytes | int] = ()
    ) -> Coroutine[Any, Any, Any]:
        """Queue a script at once, even before the result is awaited, so that calls take effect in order.

        The returned coroutine raises `StoreError`. A call is repeated only if it is known to have had no effect, and
        only while the coroutine is awaited: a cancelled call has no later effect, unless it was sent already.
        """
        attempt = _Attempt(self._topology, ScriptCall(script, bucket, keys, args), self._runtime)
        return self._track(attempt, attempt.send())

    async def finish(self) -> None:
        """Return when all calls are complete, including those that have to be sent again."""
        while self._running:
            self._ended.clear()
            await self._ended.wait()

    async def _track(self, attempt: _Attempt, future: asyncio.Future[Any]) -> Any:
        self._running += 1
        try:
            return await self._result(attempt, future)
        finally:
            self._running -= 1
            self._ended.set()

    async def _result(self, attempt: _Attempt, future: asyncio.Future[Any]) -> Any:
        deadline = self._runtime.now() + self._timeout
        while True:
            try:
                return await future
            except ResponseError as error:
                if not await attempt.retry_after_reply(error, deadline):
                    raise StoreError(describe_error(error)) from error
            except (UnsentError, LostError) as error:
                if not await attempt.retry_after_failure(error):
                    raise
            future = attempt.send()


class _Attempt:
    """The attempts to send one call to the server that owns its bucket."""

    def __init__(self, topology: ClusterTopology, call: ScriptCall, runtime: Runtime) -> None:
        self._runtime = runtime
        self._topology = topology
        self._call = call
        self._target: Node | None = None
        self._redirect: Node | None = None  # the target of the next attempt instead of the owner (ASK)
        self._redirections = 0
        self._repeated = False

    def send(self) -> asyncio.Future[Any]:
        call = self._call
        node = self._target = self._redirect or self._topology.owner(call.bucket)
        try:
            pipeline = self._topology.pipeline(call.bucket, call.keys[0], reading=call.script.single, node=node)
        except UnsentError as error:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future
        return pipeline.submit(call)

    async def retry_after_reply(self, error: ResponseError, deadline: float) -> bool:
        """Whether to send the call again after an error reply: a redirection, NOSCRIPT or TRYAGAIN."""
        self._redirections += 1
        self._redirect, self._call = None, replace(self._call, asking=False)
        if isinstance(error, ClusterDownError):
            self._topology.schedule_refresh()
            return False
        if isinstance(error, NoScriptError):
            self._call = replace(self._call, full_source=True)
            return self._redirections < _MAX_REDIRECTIONS
        if isinstance(error, AskError):  # MovedError is one
            assert self._target is not None  # noqa: S101 - a server has replied
            node = Node(error.host if error.host not in {"", "?"} else self._target.host, error.port)
            if isinstance(error, MovedError):
                self._topology.moved(self._call.bucket, node)
            else:
                self._redirect, self._call = node, replace(self._call, asking=True)
            return self._redirections < _MAX_REDIRECTIONS
        # TRYAGAIN: some of the script's keys are migrated already, others are not.
        if isinstance(error, TryAgainError) and self._runtime.now() < deadline:
            self._redirections = 0
            await self._runtime.sleep(_PAUSE)
            return True
        return False

    async def retry_after_failure(self, error: StoreError) -> bool:
        """Whether to send the call again after a failed connection: safe for unsent calls, and for reads."""
        if self._repeated or (isinstance(error, LostError) and self._call.script.writes):
            self._topology.schedule_refresh()
            return False
        self._repeated = True
        failed = self._target
        self._redirect, self._call = None, replace(self._call, asking=False)
        await self._topology.refresh()
        return isinstance(error, LostError) or self._topology.owner(self._call.bucket) not in {failed, None}

"""Running scripts where they belong: redirections, scripts that the server has forgotten, and errors in words."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from valkey.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, ResponseError, TryAgainError

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.valkey.address import Node
from batchnorm_service.store.valkey.connection import in_words
from batchnorm_service.store.valkey.pipeline import Job, LostError, UnsentError
from batchnorm_service.store.valkey.scripts import Script
from batchnorm_service.store.valkey.topology import ClusterTopology

_PAUSE: Final = 0.02  # while a bucket is in the middle of a move from one server to another
_REDIRECTIONS: Final = 16


class CommandRunner:
    """Runs scripts.

    Args:
        topology: where the buckets are.
        timeout: seconds that a call may be repeated because its bucket is on the move.
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
        """Queue a script now, whenever the answer is awaited: so calls take effect in the order they were made in.

        What comes back raises `StoreError`. A call is repeated here only when it is known to have had no effect, and
        only while somebody waits for it: what was given up never takes effect later, unless it was sent before.
        """
        attempt = _Attempt(self._topology, Job(script, bucket, keys, args), self._runtime)
        return self._answer(attempt, attempt.send())

    async def finish(self) -> None:
        """Return when nobody waits for a call any more; one that has to be sent again still is."""
        while self._running:
            self._ended.clear()
            await self._ended.wait()

    async def _answer(self, attempt: _Attempt, answer: asyncio.Future[Any]) -> Any:
        self._running += 1
        try:
            return await self._sent(attempt, answer)
        finally:
            self._running -= 1
            self._ended.set()

    async def _sent(self, attempt: _Attempt, answer: asyncio.Future[Any]) -> Any:
        deadline = self._runtime.now() + self._timeout
        while True:
            try:
                return await answer
            except ResponseError as error:
                if not await attempt.redirected(error, deadline):
                    raise StoreError(in_words(error)) from error
            except (UnsentError, LostError) as error:
                if not await attempt.rerouted(error):
                    raise
            answer = attempt.send()


class _Attempt:
    """A job on its way to the server that has its bucket."""

    def __init__(self, topology: ClusterTopology, job: Job, runtime: Runtime) -> None:
        self._runtime = runtime
        self._topology = topology
        self._job = job
        self._asked: Node | None = None
        self._node: Node | None = None  # to go to instead of the owner, once
        self._redirections = 0
        self._repeated = False

    def send(self) -> asyncio.Future[Any]:
        job = self._job
        node = self._asked = self._node or self._topology.owner(job.bucket)
        try:
            pipeline = self._topology.pipeline(job.bucket, job.keys[0], reading=job.script.single, node=node)
        except UnsentError as error:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.set_exception(error)
            return answer
        return pipeline.submit(job)

    async def redirected(self, error: ResponseError, deadline: float) -> bool:
        """Whether the server refused because the job belongs elsewhere, or has to come again."""
        self._redirections += 1
        self._node, self._job = None, replace(self._job, asking=False)
        if isinstance(error, ClusterDownError):
            self._topology.suspect()
            return False
        if isinstance(error, NoScriptError):
            self._job = replace(self._job, whole=True)
            return self._redirections < _REDIRECTIONS
        if isinstance(error, AskError):  # MovedError is one
            assert self._asked is not None  # noqa: S101 - a server has answered
            node = Node(error.host if error.host not in {"", "?"} else self._asked.host, error.port)
            if isinstance(error, MovedError):
                self._topology.moved(self._job.bucket, node)
            else:
                self._node, self._job = node, replace(self._job, asking=True)
            return self._redirections < _REDIRECTIONS
        # TRYAGAIN: some keys of the script have moved already and others not yet.
        if isinstance(error, TryAgainError) and self._runtime.now() < deadline:
            self._redirections = 0
            await self._runtime.sleep(_PAUSE)
            return True
        return False

    async def rerouted(self, error: StoreError) -> bool:
        """Whether to try again after a failed connection, which is safe for what was not sent, and for reads."""
        if self._repeated or (isinstance(error, LostError) and self._job.script.writes):
            self._topology.suspect()
            return False
        self._repeated = True
        asked = self._asked
        self._node, self._job = None, replace(self._job, asking=False)
        await self._topology.refresh()
        return isinstance(error, LostError) or self._topology.owner(self._job.bucket) not in {asked, None}

"""Processes that follow a layer: what they observe and send, and how they end.

Each has a real `AsyncFollower`, over connections on which the frames that it sends are written down.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import orjson
from safetensors.numpy import load

from batchnorm_client.async_follower import AsyncFollower
from batchnorm_client.core import Attempts, Response
from batchnorm_client.wire.errors import BatchNormError
from simulation.clients import make_client
from simulation.faults import Faults
from simulation.loop import Process
from simulation.network import Connections
from simulation.operations import Operation, Script
from simulation.replica import Replica
from simulation.runtimes import ClientRuntime

_SENT_AGAIN = (408, 502, 503, 504)
"""Statuses of a response after which a frame is sent again."""


class Told(NamedTuple):
    """What the response to a frame says."""

    version: int
    num_batches_tracked: int


@dataclass(eq=False)
class Frame:
    """Batches that a follower sent in one call.

    Attributes:
        rows: the calls that observed them.
        sent: the call, for the checker, as one of any client.
        refused: when the service said that it does not fold them; infinite if it did not.
    """

    rows: list[Operation]
    sent: Operation
    refused: float = float("inf")


class Seen(NamedTuple):
    """What a call of a follower returned, and what the follower had been told by then.

    Attributes:
        output: of `eval` and `observe`.
        versions: of the frames that were sent, by key: None if there was no response, 0 if they were refused.
    """

    output: Any
    versions: dict[str, int | None]


class FollowerProcess:
    """A process with one follower, until it closes the follower or is killed.

    Args:
        layer: its name.
        options: of the follower.
        operations: those of the world, to which its own are added.
        replicas: of the service.
        random: the world's.
        faults: how often what goes wrong.

    Attributes:
        operations: its own, in this order.
        frames: what it sent, by key.
        unsent: how many batches the follower said were not known to be folded: at this time, after so many operations.
        findings: what broke a promise and is seen at once.
        ended: whether the follower is closed or the process killed.
    """

    def __init__(
        self,
        layer: str,
        options: dict[str, Any],
        operations: list[Operation],
        replicas: list[Replica],
        random: Random,
        faults: Faults,
    ) -> None:
        self.layer = layer
        self.options = options
        self.operations: list[Operation] = []
        self.frames: dict[str, Frame] = {}
        self.unsent: list[tuple[float, int, int]] = []
        self.findings: list[str] = []
        self.ended = False
        self._all = operations
        self._random = random
        self._faults = faults
        self._process = Process("follower")
        self._runtime = ClientRuntime(random)
        self._client = make_client(_Connections(self, replicas, random, faults), self._runtime)
        self._follower: AsyncFollower | None = None

    def observed(self, operations: int | None = None) -> list[Operation]:
        """The operations that counted a batch, among the first so many of all."""
        return [one for one in self.operations[:operations] if one.kind == "follower.observe" and one.acknowledged]

    async def step(self, kind: str, arguments: dict[str, Any]) -> None:
        """Carry out a step; with `killed_after`, kill the process so many seconds after its begin."""
        task = self._process.spawn(self._step(kind, arguments))
        if (killed_after := arguments.get("killed_after")) is None:
            await task
        else:
            await asyncio.sleep(killed_after)
            self.kill()

    def kill(self) -> None:
        """As SIGKILL does."""
        self._note_unsent()
        self._process.kill()
        self.ended = True
        closing = self.operations and self.operations[-1].kind == "follower.close"
        if self._follower is not None and self._follower.unsent and not (self._runtime.exits or closing):
            self.findings.append("a process that exited now would not say what it loses")

    def fork(self, child: FollowerProcess) -> None:
        """A process as `os.fork` makes one: with a copy of the follower's memory, and no task that runs."""
        for follower in self._runtime.forks:
            child._follower = copy.copy(follower)
            child._follower._client, child._follower._runtime = child._client, child._runtime
            child._runtime.forks.append(child._follower)
            child._follower.forked()

    async def _step(self, kind: str, arguments: dict[str, Any]) -> None:
        if self._follower is None:
            self._follower = await self._call("follow", {}, self._client.follow(self.layer, **self.options))
        follower = self._follower
        if follower is None:
            self.ended = True
            return
        match kind:
            case "observe":
                await self._call(kind, arguments, follower.observe(arguments["batch"]))
            case "eval":
                await self._call(kind, arguments, follower.eval(arguments["batch"]))
            case "flush":
                await self._call(kind, arguments, follower.flush())
            case "close":
                await self._call(kind, arguments, follower.aclose())
                self.ended = True

    async def _call(self, kind: str, arguments: dict[str, Any], call: Awaitable[Any]) -> Any:
        operation = Operation(f"follower.{kind}", self.layer, arguments, self._now())
        self.operations.append(operation)
        self._all.append(operation)
        patience = self._random.expovariate(2) if self._random.random() < self._faults.gives_up else None
        result = None
        try:
            async with asyncio.timeout(patience):
                result = await call
            operation.result = Seen(result, self._versions())
        except TimeoutError:
            operation.gave_up = True
        except BatchNormError as error:
            operation.error = error
        except Exception as error:
            operation.gave_up = True
            self.findings.append(f"{operation}: {error!r}")
        operation.ended = self._now()
        self._note_unsent()
        return result

    def _versions(self) -> dict[str, int | None]:
        told = {key: frame.sent.result for key, frame in self.frames.items()}
        refused = {key: 0 for key, frame in self.frames.items() if frame.refused < float("inf")}
        return {key: result and result.version for key, result in told.items()} | refused

    def _note_unsent(self) -> None:
        if self._follower is not None:
            self.unsent.append((self._now(), len(self.operations), self._follower.unsent))

    def send(self, key: str, body: bytes) -> Frame:
        """A frame is sent, perhaps again."""
        tensors = load(body)
        rows = [self._observation(mean) for mean in tensors["mean"]]
        frame = self.frames.get(key)
        if frame is None or frame.rows != rows:
            if frame is not None:
                self.findings.append(f"{frame.sent}: other batches were sent under its key")
            arguments = {"batch": [one.arguments["batch"] for one in rows], "key": key}
            frame = self.frames[key] = Frame(rows, Operation("fold_moments", self.layer, arguments, self._now()))
            self._all.append(frame.sent)
        return frame

    def _observation(self, mean: Any) -> Operation:
        for one in self.operations:
            if one.kind == "follower.observe" and np.abs(one.arguments["mean"] - mean).max() < 1e-9:
                return one
        raise AssertionError("a batch was sent that was not observed")

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class _Connections(Connections):
    """Connections of a follower's client."""

    def __init__(self, process: FollowerProcess, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._process = process

    async def send(self, attempts: Attempts[Any]) -> Response:
        request = attempts.request
        if not request.target.endswith("/moments"):
            return await super().send(attempts)
        frame = self._process.send(request.headers["Idempotency-Key"], b"".join(request.pieces))
        response = await super().send(attempts)
        now = asyncio.get_running_loop().time()
        if response.status == 200 and frame.sent.result is None:
            told = orjson.loads(response.body)
            frame.sent.result = Told(told["version"], told["num_batches_tracked"])
            frame.sent.ended = now
        elif response.status not in (200, *_SENT_AGAIN):
            frame.refused = now
        return response


class Followers:
    """All processes with followers.

    Args:
        arguments: those of `FollowerProcess` that all share.

    Attributes:
        processes: in the order in which they began.
    """

    def __init__(self, *arguments: Any) -> None:
        self.processes: list[FollowerProcess] = []
        self._arguments = arguments

    async def carry_out(self, script: Script, first: Awaitable[object]) -> None:
        """All steps, one after the other, after `first`; a new process begins where the one before has ended."""
        await asyncio.wait([asyncio.ensure_future(first)])
        mine: list[FollowerProcess] = []
        for pause, kind, layer, arguments in script.steps:
            await asyncio.sleep(pause)
            if not mine or mine[-1].ended:
                mine.append(self._begin(layer, arguments["options"]))
            if kind == "fork":
                mine.append(self._begin(layer, arguments["options"]))
                mine[-2].fork(mine[-1])
            else:
                await mine[-1].step(kind, arguments)
        for each in mine:
            if not each.ended:
                await each.step("close", {})

    def _begin(self, layer: str, options: dict[str, Any]) -> FollowerProcess:
        process = FollowerProcess(layer, options, *self._arguments)
        self.processes.append(process)
        return process

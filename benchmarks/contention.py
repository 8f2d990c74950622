"""Replicas that train one layer at once over one Valkey server, each a process of its own, and what that cost them."""

from __future__ import annotations

import asyncio
import bisect
import multiprocessing
import sys
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batchnorm_client.contract import LayerConfig
from batchnorm_client.tensors import Tensor
from batchnorm_service.layers import Layers, LayersOptions
from batchnorm_service.store.valkey import ValkeyStore

# The tests know how to count what a store is asked.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from store.counted import Counted

CHANNELS, ROWS = 64, 32
_PATIENCE = 120.0  # seconds


class Run(NamedTuple):
    """What R replicas did on one layer.

    Attributes:
        replicas: how many.
        callers: of each.
        calls: train calls that were acknowledged.
        seconds: that they took.
        commits: tries to commit.
        conflicts: those that lost a race.
        loads: looks at the record.
        waits: seconds that each call took, sorted.
        finished: calls that each replica had finished when the first had finished all of its own.
    """

    replicas: int
    callers: int
    calls: int
    seconds: float
    commits: int
    conflicts: int
    loads: int
    waits: list[float]
    finished: list[int]

    @property
    def trips(self) -> float:
        """Round trips to the store per train call."""
        return (self.commits + self.loads) / self.calls


class _Part(NamedTuple):
    """What one replica did: its counts, how long each call took, and when each ended, in order."""

    counts: dict[str, int]
    began: float
    waits: list[float]
    ends: list[float]


def contend(url: str, replicas: int, callers: int, calls: int, name: str) -> Run:
    """Let `callers` of each of R replicas make `calls` train calls each, one after the other, on one layer."""
    asyncio.run(_create(url, name))
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(replicas)
    with context.Pool(replicas, _prepare, (start,)) as pool:
        asked = [pool.apply_async(_replica, (url, callers, calls, name)) for _ in range(replicas)]
        parts: list[_Part] = [one.get(_PATIENCE) for one in asked]
    first = min(part.ends[-1] for part in parts)
    total = {what: sum(part.counts.get(what, 0) for part in parts) for what in ("commit", "conflict", "load")}
    return Run(
        replicas,
        callers,
        replicas * callers * calls,
        max(part.ends[-1] for part in parts) - min(part.began for part in parts),
        total["commit"],
        total["conflict"],
        total["load"],
        sorted(wait for part in parts for wait in part.waits),
        [bisect.bisect_right(part.ends, first) for part in parts],
    )


async def _create(url: str, name: str) -> None:
    store = ValkeyStore(url)
    await store.open()
    try:
        await Layers(store).create(name, LayerConfig(num_features=CHANNELS))
    finally:
        await store.close()


_start: Barrier


def _prepare(start: Barrier) -> None:
    global _start  # noqa: PLW0603 - a barrier reaches a process of a pool in no other way
    _start = start
    torch.set_num_threads(1)


def _replica(url: str, callers: int, calls: int, name: str) -> _Part:
    """In a process of its own: all replicas begin together."""
    return asyncio.run(_train(url, callers, calls, name))


async def _train(url: str, callers: int, calls: int, name: str) -> _Part:
    batch = {"input": Tensor.of(np.random.default_rng(1).normal(size=(ROWS, CHANNELS)).astype(np.float32))}
    waits: list[float] = []
    ends: list[float] = []

    def read(_: Mapping[str, str]) -> Mapping[str, Tensor]:
        return batch

    async def caller() -> None:
        for _ in range(calls):
            began = time.monotonic()  # one clock for all processes of a machine
            await service.batches.train(name, read, None)
            ends.append(time.monotonic())
            waits.append(ends[-1] - began)

    store = Counted(ValkeyStore(url))
    await store.open()
    service = Layers(store, LayersOptions(store_timeout=60))  # type: ignore[arg-type]
    try:
        await service.get(name)
        await service.batches.eval(name, read)  # torch has loaded what it needs
        store.counts.clear()
        _start.wait(_PATIENCE)
        began = time.monotonic()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return _Part(dict(store.counts), began, waits, ends)
    finally:
        await service.close()
        await store.close()

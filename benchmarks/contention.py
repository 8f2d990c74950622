"""Replicas that train one layer at once over one Valkey server, each a process of its own, and what that cost them.

`python -m benchmarks.contention --delay 5` puts 5 ms before the server in each direction, as replicas on machines of
their own have: without it, more replicas than cores take each other's time, and that is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import Layers, LayersOptions
from batchnorm_service.store.valkey.store import ValkeyStore
from benchmarks.delay import delayed

# The tests know how to start a server, and how to count what a store is asked.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from store import valkey_servers
from store.counted import Counted

CHANNELS, ROWS = 64, 32
REPLICAS = (1, 2, 4, 8)
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
        turns: commits that each call saw from its begin to its own, that one included, sorted.
        shares: calls of each replica.
    """

    replicas: int
    callers: int
    calls: int
    seconds: float
    commits: int
    conflicts: int
    loads: int
    waits: list[float]
    turns: list[int]
    shares: list[int]

    @property
    def rate(self) -> float:
        """Folds per second."""
        return self.calls / self.seconds

    @property
    def trips(self) -> float:
        """Round trips to the store per train call."""
        return (self.commits + self.loads) / self.calls

    @property
    def slowest(self) -> float:
        """What the slowest replica did, of what the fastest did."""
        return min(self.shares) / max(self.shares)


class _Call(NamedTuple):
    """When a call began and ended, and the version that its fold was committed in."""

    began: float
    ended: float
    version: int


class _Part(NamedTuple):
    """What one replica did: its counts and its calls."""

    counts: dict[str, int]
    calls: list[_Call]


def contend(url: str, replicas: int, callers: int, seconds: float, name: str, runs: int = 1) -> list[Run]:
    """Let `callers` of each of R replicas train one layer for so many seconds, each one call after the other.

    Every run has a layer of its own.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(replicas)
    results = []
    with context.Pool(replicas, _prepare, (start,)) as pool:
        for number in range(runs):
            layer = f"{name}-{number}"
            asyncio.run(_create(url, layer))
            asked = [pool.apply_async(_replica, (url, callers, seconds, layer)) for _ in range(replicas)]
            results.append(_run(callers, [one.get(_PATIENCE) for one in asked]))
    return results


def _run(callers: int, parts: Sequence[_Part]) -> Run:
    calls = [call for part in parts for call in part.calls]
    total = {what: sum(part.counts.get(what, 0) for part in parts) for what in ("commit", "conflict", "load")}
    return Run(
        len(parts),
        callers,
        len(calls),
        max(call.ended for call in calls) - min(call.began for call in calls),
        total["commit"],
        total["conflict"],
        total["load"],
        sorted(call.ended - call.began for call in calls),
        sorted(_turns(calls)),
        [len(part.calls) for part in parts],
    )


def _turns(calls: Sequence[_Call]) -> Iterator[int]:
    """How many commits were made from when each call began: those are known that were answered before."""
    answered = sorted((call.ended, call.version) for call in calls)
    newest = [1]
    for _, version in answered:
        newest.append(max(newest[-1], version))
    for call in calls:
        yield call.version - newest[bisect.bisect_left(answered, (call.began, 0))]


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


def _replica(url: str, callers: int, seconds: float, name: str) -> _Part:
    """In a process of its own: all replicas begin together."""
    return asyncio.run(_train(url, callers, seconds, name))


async def _train(url: str, callers: int, seconds: float, name: str) -> _Part:
    batch = {"input": Tensor.of(np.random.default_rng(1).normal(size=(ROWS, CHANNELS)).astype(np.float32))}
    calls: list[_Call] = []

    def read(_: Mapping[str, str]) -> Mapping[str, Tensor]:
        return batch

    async def caller(until: float) -> None:
        while (began := time.monotonic()) < until:  # one clock for all processes of a machine
            done = await service.batches.train(name, read, None)
            calls.append(_Call(began, time.monotonic(), done.version))

    store = Counted(ValkeyStore(url))
    await store.open()
    service = Layers(store, LayersOptions(store_timeout=60))  # type: ignore[arg-type]
    try:
        await service.get(name)
        await service.batches.eval(name, read)  # torch has loaded what it needs
        store.counts.clear()
        _start.wait(_PATIENCE)
        until = time.monotonic() + seconds
        await asyncio.gather(*(caller(until) for _ in range(callers)))
        return _Part(dict(store.counts), calls)
    finally:
        await service.close()
        await store.close()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contention", description=__doc__)
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds to the store, and as many back")
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--callers", type=int, nargs="+", default=[16])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print(
        "| replicas | callers of each | folds/s, median (range) | slowest replica, of the fastest: median, least"
        " | runs below a half | longest wait, in commits | races lost | round trips per call |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory, valkey_servers.server(Path(directory)) as server:
        way = delayed(server.port, given.delay / 1000) if given.delay else nullcontext(server.port)
        with way as port:
            for callers, replicas in itertools.product(given.callers, given.replicas):
                url, name = f"valkey://127.0.0.1:{port}/0", f"hot-{replicas}-{callers}"
                print(_summary(contend(url, replicas, callers, given.seconds, name, given.runs)), flush=True)


def _summary(runs: Sequence[Run]) -> str:
    one = sorted(runs, key=lambda run: run.rate)[len(runs) // 2]
    rates = [run.rate for run in runs]
    slowest = sorted(run.slowest for run in runs)
    return (
        f"| {one.replicas} | {one.callers} | {one.rate:,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"
        f" | {slowest[len(runs) // 2]:.0%}, {slowest[0]:.0%} | {sum(share < 0.5 for share in slowest)} of {len(runs)}"
        f" | {max(run.turns[-1] for run in runs)} | {one.conflicts / one.commits:.0%} | {one.trips:.3f} |"
    )


if __name__ == "__main__":
    main()

"""A store with very many layers: how long a start takes, and the first call on a layer that is not in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.engine.state import initial_state
from batchnorm_service.layers.records import encode_new, now
from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.sqlite.store import SqliteStore
from benchmarks.bench import Bench
from benchmarks.bodies import KIB, call, safetensors
from benchmarks.figures import Row, Target
from benchmarks.load import Call, drive

_AT_ONCE = 1000


def start(bench: Bench) -> Iterator[Row]:
    """From the start of the process to its first answer; then eval on layers that nobody has used."""
    count = bench.pace.cold_layers
    asyncio.run(_fill(bench.directory / "cold.db", count))
    seconds, touches = [], []
    body = safetensors(8 * KIB)
    for _ in range(bench.pace.rounds):
        server = bench.own_service("cold")
        seconds.append(server.seconds)
        warm = bench.layer(_name(0), server=server)
        drive(Call(server.port, [call(warm, "eval", body)], 1), 0.1 + bench.pace.warm)
        cold = random.Random(len(seconds)).sample(range(1, count), min(count - 1, 200))
        for number in cold:
            measured = drive(Call(server.port, [call(_name(number), "eval", body)], 1), 60, most=1)
            touches.append(measured.latencies[0] * 1e3)
        server.stop()
    yield Row(f"start to ready with {count:,} layers in SQLite", Target(2, least=False, unit=" s"), tuple(seconds))
    touches.sort()
    p99 = touches[int(len(touches) * 0.99)]
    what = "first call on a layer that is not in memory (eval of 8 KiB)"
    note = f"p99 {p99:.2g} ms of {len(touches):,} layers"
    middle = tuple(touches[len(touches) // 4 : len(touches) * 3 // 4 + 1])  # the spread is that of the middle half
    yield Row(what, Target(5, least=False, unit=" ms"), middle, note)


async def _fill(path: Path, count: int) -> None:
    store = SqliteStore(path)
    await store.open()
    config = LayerConfig(num_features=64)
    data = encode_new(initial_state(config), now(RUNTIME))
    for first in range(0, count, _AT_ONCE):
        names = map(_name, range(first, min(count, first + _AT_ONCE)))
        await asyncio.gather(*(store.create(name, data, count) for name in names))
    await store.close()


def _name(number: int) -> str:
    return f"cold.{number:06}"

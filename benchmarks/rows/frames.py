"""Folds of moments that stayed with the callers: a thousand in one call, and one by one; each with a key of its own."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, encode
from benchmarks.bench import Bench
from benchmarks.bodies import CHANNELS
from benchmarks.figures import Row, Target
from benchmarks.load import Call, drive, request

_ROWS, _CONNECTIONS = 1000, 8
_GOAL = Target(200_000, unit="/s")


def frames(bench: Bench) -> Iterator[Row]:
    """How many folds a second are durable and counted exactly once, with SQLite and a flush for each commit."""
    for statistics in ("moving", "population"):
        yield _folds(bench, statistics)


def _folds(bench: Bench, statistics: str) -> Row:
    server = bench.own_service(statistics)
    name = bench.layer("obs", CHANNELS, server, statistics=statistics)
    single = Call(server.port, lambda: _keyed(name, _moments(())), _CONNECTIONS)
    frame = Call(server.port, lambda: _keyed(name, _moments((_ROWS,))), _CONNECTIONS)
    bench.warm(single, frame)
    singles = bench.rate(single)
    used = server.used()
    rounds = [drive(frame, bench.pace.seconds) for _ in range(bench.pace.rounds)]
    rates = tuple(each.rate * _ROWS for each in rounds)
    seconds = (server.used() - used) / sum(len(each.latencies) for each in rounds) / _ROWS
    server.stop()
    size = _receipt_bytes(bench.directory / f"{statistics}.db")
    what = f"{statistics}: folds of {CHANNELS} channels in frames of {_ROWS:,}, {_CONNECTIONS} connections"
    receipts = f"receipts of a million folds: {size:,.0f} MB one by one, {size / _ROWS * 1000:,.0f} kB in frames"
    return Row(what, _GOAL, rates, f"{seconds * 1e6:.1f} µs of a core each; single calls {singles:,.0f}/s; {receipts}")


def _receipt_bytes(file: Path) -> float:
    """Bytes of the file for each receipt, with its index."""
    with sqlite3.connect(file) as connection:
        (count,) = connection.execute("SELECT count(*) FROM receipts").fetchone()
        (size,) = connection.execute("SELECT sum(pgsize) FROM dbstat WHERE name LIKE '%receipts%'").fetchone()
    return float(size) / count


def _moments(rows: tuple[int, ...]) -> bytes:
    random = np.random.default_rng(0)
    counts = random.integers(2, 100, rows)
    moments = {"count": counts, "mean": random.normal(size=(*rows, CHANNELS)), "var": random.random((*rows, CHANNELS))}
    return b"".join(encode(SAFETENSORS, {name: Tensor.of(np.asarray(array)) for name, array in moments.items()}))


_numbers = itertools.count()


def _keyed(name: str, body: bytes) -> Iterator[bytes]:
    """The same moments again and again, each time with a new key."""
    while True:
        key = f"Idempotency-Key: bench-{next(_numbers)}\r\n"
        yield request(f"/v1/layers/{name}/moments", body, SAFETENSORS, headers=key)

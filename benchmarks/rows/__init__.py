"""The rows of the table, each measured by a function of `Bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.bench import Bench
from benchmarks.figures import Row
from benchmarks.rows import binary, client, documents, frames, memory, peers, start, tail, telemetry

ROWS: Final[dict[str, Callable[[Bench], Iterator[Row]]]] = {
    "eval": binary.evaluate,
    "metrics": telemetry.metrics,
    "telemetry": telemetry.telemetry,
    "inference": binary.inference,
    "train": binary.train,
    "layers": binary.many_layers,
    "frames": frames.frames,
    "json": documents.json,
    "peers": peers.peers,
    "tail": tail.tail,
    "memory": memory.memory,
    "start": start.start,
    "client": client.client,
}
"""By the name that `--only` takes."""

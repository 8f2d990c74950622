"""`python -m benchmarks.history`: what keeping states costs a train call, in microseconds of processor time.

One layer of 64 channels in an SQLite file, batches of 8 KiB, one call after the other, in this process: without a
history, with the default one, and with a state kept before every batch. In turns; the least of several rounds each.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import Layers, LayersOptions
from batchnorm_service.store.sqlite.store import SqliteStore
from benchmarks.bodies import CHANNELS

_ROUNDS, _CALLS = 20, 200
_KINDS = {
    "no history": LayersOptions(history_length=0),
    "one state a minute (default)": LayersOptions(),
    "a state before every batch": LayersOptions(history_seconds=0.0),
}


async def _measure(directory: Path) -> dict[str, float]:
    batch = Tensor.of(np.random.default_rng(0).normal(size=(32, CHANNELS)).astype(np.float32))
    opened: dict[str, tuple[SqliteStore, Layers]] = {}
    for number, (kind, options) in enumerate(_KINDS.items()):
        store = SqliteStore(directory / f"{number}.db")
        await store.open()
        layers = Layers(store, options)
        await layers.create("bench", LayerConfig(num_features=CHANNELS))
        opened[kind] = store, layers
    least: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for kind, (_, layers) in opened.items():
            began = time.process_time()
            for _ in range(_CALLS):
                await layers.batches.train("bench", lambda _: {"input": batch}, None)
            took = (time.process_time() - began) / _CALLS * 1e6
            least[kind] = min(took, least.get(kind, took))
    for store, layers in opened.values():
        await layers.close()
        await store.close()
    return least


def main() -> None:
    """Print a line for each kind."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        least = asyncio.run(_measure(Path(directory)))
    base = least["no history"]
    for kind, took in least.items():
        print(f"{kind:32}{took:8.1f} us  {took / base:.2f}")


if __name__ == "__main__":
    main()

"""A pinned state is served bit by bit, with its digest, whatever happens to its layer and its store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.backup import backup, restore
from batchnorm_service.layers import Layers
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.store import ValkeyStore
from batchnorm_service.transfer import migrate
from layers.conftest import serving, train
from service.account import CHANNELS, batch, digest
from store.valkey_servers import Server, flush

pytestmark = pytest.mark.anyio

KEEP_ALL = {"history_seconds": 0.0}


def silent(*_: object) -> None:
    """Nobody looks at the progress."""


class Pinned:
    """A state that torch has computed, and the first answer to an eval with it."""

    def __init__(self, module: nn.BatchNorm1d) -> None:
        self._tensors = {name: value.numpy().copy() for name, value in module.state_dict().items()}
        self._digest = digest(self._tensors)
        self._output = b""

    async def check(self, layers: Layers) -> None:
        """Tensors, counters, digest and output are what they were."""
        found = await layers.get("bn", "ckpt")
        assert {name: value.numpy().tobytes() for name, value in found.tensors.items()} == {
            name: value.tobytes() for name, value in self._tensors.items()
        }
        (pin,) = (await layers.history.pins("bn")).pins
        assert (pin.tag, pin.digest) == ("ckpt", self._digest)
        wire = {"input": Tensor.of(batch(99))}
        evaluated = await layers.batches.eval("bn", lambda _: wire, at="ckpt", expect=self._digest)
        output = evaluated.output.numpy().tobytes()
        self._output = self._output or output
        assert output == self._output


async def test_a_pin_survives(tmp_path: Path, valkey_server: Server) -> None:
    """Reset, rollback, PUT state, PATCH, 1,000 batches, restarts, a backup, and moves to another store and back."""
    store, module = SqliteStore(tmp_path / "layers.db"), nn.BatchNorm1d(CHANNELS)
    async with serving(store, **KEEP_ALL) as layers:
        await layers.create("bn", LayerConfig(num_features=CHANNELS))
        for seed in range(3):
            await train(layers, "bn", batch(seed))
            module(torch.from_numpy(batch(seed)))
        pin, _ = await layers.history.pin("bn", "ckpt", None, None)
        pinned = Pinned(module)
        await pinned.check(layers)
        await layers.reset("bn", "all", None, None)
        await pinned.check(layers)
        await layers.rollback("bn", "ckpt", None, None)
        await train(layers, "bn", batch(4))
        await layers.rollback("bn", pin.version, None, None)
        await pinned.check(layers)
        await layers.update("bn", LayerUpdate(eps=0.5), None)
        await layers.replace_state("bn", lambda _: {"weight": Tensor.of(np.full(CHANNELS, 7, np.float32))}, None)
        for seed in range(1000):
            await train(layers, "bn", batch(seed))
        await pinned.check(layers)
        assert len((await layers.history.list("bn", 1000, None)).history) == 22, (
            "the newest, 20 kept, and the pinned one"
        )
    async with serving(store, **KEEP_ALL) as layers:
        await pinned.check(layers)
    await asyncio.to_thread(backup, SqliteStore(tmp_path / "layers.db"), tmp_path / "backup.db", silent)
    flush([valkey_server])
    assert (await migrate(SqliteStore(tmp_path / "layers.db"), ValkeyStore(valkey_server.url), silent)).complete
    async with serving(ValkeyStore(valkey_server.url), **KEEP_ALL) as layers:
        await pinned.check(layers)
        for seed in range(30):
            await train(layers, "bn", batch(seed))
        await layers.reset("bn", "all", None, None)
        await pinned.check(layers)
    assert (await migrate(ValkeyStore(valkey_server.url), SqliteStore(tmp_path / "back.db"), silent)).complete
    await asyncio.to_thread(
        restore, SqliteStore(tmp_path / "layers.db"), tmp_path / "backup.db", silent, overwrite=True
    )
    for name in ("back.db", "layers.db"):
        async with serving(SqliteStore(tmp_path / name), **KEEP_ALL) as layers:
            await pinned.check(layers)
            await layers.rollback("bn", "ckpt", None, None)
            assert (await layers.get("bn")).num_batches_tracked == 3
            await pinned.check(layers)

"""Layers without HTTP: a store in memory, and small helpers to call them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from batchnorm_client.contract import LayerConfig
from batchnorm_client.tensors import Tensor
from batchnorm_service.layers import Layers, LayersOptions, Normalized
from batchnorm_service.store.base import Store


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def batch(seed: int, rows: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed, 2, size=(rows, channels)).astype(np.float32)


@pytest.fixture(params=[False, True], ids=["waiting for all", "waiting for the commit"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` as the ASGI way calls it, and as the direct way does."""
    monkeypatch.setattr(_Way, "soon", request.param)


class _Way:
    soon = False


async def train(layers: Layers, name: str, array: np.ndarray, key: str | None = None, **options: Any) -> Normalized:
    def read(_: Mapping[str, str]) -> dict[str, Tensor]:
        return {"input": Tensor.of(array)}

    training = layers.batches.train_soon(name, read, key) if _Way.soon and not options else None
    if training is None:
        return await layers.batches.train(name, read, key, **options)
    with contextlib.suppress(Exception):
        await training.folded
    return training.result() or await training.rest()


async def evaluate(layers: Layers, name: str, array: np.ndarray) -> Normalized:
    return await layers.batches.eval(name, lambda _: {"input": Tensor.of(array)})


@asynccontextmanager
async def serving(store: Store, **options: Any) -> AsyncIterator[Layers]:
    """`Layers` over a store that is opened before and closed after."""
    await store.open()
    layers = Layers(store, LayersOptions(**options))
    await layers.open()
    try:
        yield layers
    finally:
        await layers.close()
        await store.close()


CONFIG = LayerConfig(num_features=3)

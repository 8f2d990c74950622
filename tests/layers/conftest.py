"""Layers without HTTP: a store in memory, and small helpers to call them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import Folded, Layers, LayersOptions, Normalized, Waiting
from batchnorm_service.store.base import Store

T = TypeVar("T")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def batch(seed: int, rows: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed, 2, size=(rows, channels)).astype(np.float32)


@pytest.fixture(params=[False, True], ids=["waiting for all", "waiting for the commit"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` and `fold_moments` as the ASGI way calls them, and as the direct way does."""
    monkeypatch.setattr(_Way, "soon", request.param)


class _Way:
    soon = False


async def train(layers: Layers, name: str, array: np.ndarray, key: str | None = None, **options: Any) -> Normalized:
    def read(_: Mapping[str, str]) -> dict[str, Tensor]:
        return {"input": Tensor.of(array)}

    training = layers.batches.train_soon(name, read, key) if _Way.soon and not options else None
    if training is None:
        return await layers.batches.train(name, read, key, **options)
    return await finished(training)


async def fold_moments(
    layers: Layers, name: str, count: int, mean: np.ndarray, var: np.ndarray, key: str | None = None
) -> Folded:
    tensors = {"count": Tensor.of(np.array(count, np.int64)), "mean": Tensor.of(mean), "var": Tensor.of(var)}
    posting = layers.batches.fold_moments_soon(name, lambda _: tensors, key) if _Way.soon else None
    if posting is None:
        return await layers.batches.fold_moments(name, lambda _: tensors, key)
    return await finished(posting)


async def finished(waiting: Waiting[T]) -> T:
    """As the direct way waits."""
    with contextlib.suppress(Exception):
        await waiting.folded
    return waiting.result() or await waiting.rest()


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

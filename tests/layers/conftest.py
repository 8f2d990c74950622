"""Layers without HTTP: a store in memory, and small helpers to call them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.fast_path.eager import start
from batchnorm_service.layers import Folded, Layers, LayersOptions, Normalized
from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import Store

T = TypeVar("T")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def batch(seed: int, rows: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed, 2, size=(rows, channels)).astype(np.float32)


@pytest.fixture(params=[False, True], ids=["as a task", "started eagerly"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` and `fold_moments` as ASGI starts them, and as the fast path does."""
    monkeypatch.setattr(_Way, "eager", request.param)


class _Way:
    eager = False


async def train(layers: Layers, name: str, array: np.ndarray, key: str | None = None, **options: Any) -> Normalized:
    return await started(layers.batches.train(name, lambda _: {"input": Tensor.of(array)}, key, **options))


async def fold_moments(
    layers: Layers, name: str, count: int | np.ndarray, mean: np.ndarray, var: np.ndarray, key: str | None = None
) -> Folded:
    tensors = {"count": Tensor.of(np.array(count, np.int64)), "mean": Tensor.of(mean), "var": Tensor.of(var)}
    return await started(layers.batches.fold_moments(name, lambda _: tensors, key))


async def settle() -> None:
    """Let everything go on that waits for no thread and no clock."""
    for _ in range(100):
        await asyncio.sleep(0)


async def started(call: Coroutine[Any, Any, T]) -> T:
    """What a call returns."""
    if not _Way.eager:
        return await call
    found = start(call, asyncio.get_running_loop())
    return await found if isinstance(found, asyncio.Task) else found


async def evaluate(layers: Layers, name: str, array: np.ndarray) -> Normalized:
    return await layers.batches.eval(name, lambda _: {"input": Tensor.of(array)})


@asynccontextmanager
async def serving(store: Store, runtime: Runtime = RUNTIME, **options: Any) -> AsyncIterator[Layers]:
    """`Layers` over a store that is opened before and closed after."""
    await store.open()
    layers = Layers(store, LayersOptions(**options), runtime)
    await layers.open()
    try:
        yield layers
    finally:
        await layers.close()
        await store.close()


CONFIG = LayerConfig(num_features=3)

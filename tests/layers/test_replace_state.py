"""PUT state: read once, before it waits in the queue, and checked against the state that it is committed on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.store.base import Conflict
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import CONFIG, batch, serving, train

pytestmark = pytest.mark.anyio


async def test_a_state_is_read_once_and_not_in_the_queue() -> None:
    """It was decoded by the committer, on the event loop, and again after each conflict."""

    class Contended(MemoryStore):
        conflicts = 0

        async def commit(self, *args: Any) -> Any:
            if self.conflicts:
                self.conflicts -= 1
                return Conflict(None)
            return await super().commit(*args)

    reads = 0

    def read(_: Mapping[str, str]) -> dict[str, Tensor]:
        nonlocal reads
        reads += 1
        assert layers._cache.get("a").queue.idle
        assert threading.current_thread() is not threading.main_thread()
        return {"running_mean": Tensor.of(np.full(3, 7, np.float32))}

    store = Contended()
    async with serving(store, inline_bytes=0) as layers:
        await layers.create("a", CONFIG)
        await train(layers, "a", batch(1))
        store.conflicts = 3
        layer = await layers.replace_state("a", read, None, nbytes=1)
        assert (reads, store.conflicts) == (1, 0)
        assert layer.tensors["running_mean"].numpy().tolist() == [7, 7, 7]
        assert layer.num_batches_tracked == 1


async def test_a_state_is_read_again_for_the_layer_that_has_the_name_now() -> None:
    """JSON numbers are read in the layer's dtype, and that may be another by then."""
    dtypes, begun, may_end = [], threading.Event(), threading.Event()

    def read(known: Mapping[str, str]) -> dict[str, Tensor]:
        dtypes.append(known["weight"])
        begun.set()
        assert may_end.wait(30)
        return {"weight": Tensor.of(np.full(3, 0.1, known["weight"]))}

    async with serving(MemoryStore(), inline_bytes=0) as layers:
        await layers.create("a", CONFIG)
        replacing = asyncio.create_task(layers.replace_state("a", read, None, nbytes=1))
        await asyncio.to_thread(begun.wait, 30)
        await layers.delete("a", None)
        await layers.create("a", LayerConfig(num_features=3, dtype="float64"))
        may_end.set()
        layer = await replacing
        assert dtypes == ["float32", "float64"]
        assert layer.tensors["weight"].numpy().tolist() == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("nbytes", [0, 1])
async def test_a_version_that_has_gone_is_told_before_what_is_wrong_with_the_body(nbytes: int) -> None:
    def broken(_: Mapping[str, str]) -> dict[str, Tensor]:
        raise errors.MalformedBody("not JSON")

    async with serving(MemoryStore(), inline_bytes=0) as layers:
        made, _ = await layers.create("a", CONFIG)
        await train(layers, "a", batch(1))
        before = await layers.get("a")
        with pytest.raises(errors.VersionMismatch):
            await layers.replace_state("a", broken, frozenset([made.version]), nbytes=nbytes)
        with pytest.raises(errors.MalformedBody):
            await layers.replace_state("a", broken, frozenset([before.version]), nbytes=nbytes)
        with pytest.raises(errors.LayerNotFound):
            await layers.replace_state("none", broken, None, nbytes=nbytes)
        assert await layers.get("a") == before


async def test_the_shapes_are_those_of_the_layer_that_is_replaced() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        for wrong, problem in (
            (np.ones(4, np.float32), errors.ShapeMismatch),
            (np.ones(3, np.float64), errors.DtypeMismatch),
        ):
            with pytest.raises(problem):
                await layers.replace_state("a", lambda _, wrong=wrong: {"bias": Tensor.of(wrong)}, None)

"""A layer in memory has one cache and one queue, however often it is evicted and loaded again."""

from __future__ import annotations

import asyncio
import random
import weakref
from collections import Counter
from typing import Any

import pytest

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerUpdate
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.normalize import train_step
from batchnorm_service.fast_path.eager import start
from batchnorm_service.layers import Layers, cache
from batchnorm_service.layers.compute import ComputeExecutor
from batchnorm_service.layers.update_queue import NoObserver
from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.telemetry import NoMetrics
from batchnorm_service.telemetry.layers import LayerMetrics
from layers.conftest import CONFIG, batch, evaluate, serving, train

pytestmark = pytest.mark.anyio


async def test_a_layer_that_is_loaded_while_another_is_busy_is_not_evicted_while_it_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new entry was evicted before its user was counted: train was acknowledged, eval and GET said 0 for ever."""
    computing = {rows: (asyncio.Event(), asyncio.Event()) for rows in (4, 5)}  # by batch: has begun, may end
    run = ComputeExecutor.run

    async def held_up(self: ComputeExecutor, nbytes: int, function: Any, *args: Any, **kwargs: Any) -> Any:
        if function is train_step:
            begun, may_end = computing[len(args[1])]
            begun.set()
            await may_end.wait()
        return await run(self, nbytes, function, *args, **kwargs)

    monkeypatch.setattr(ComputeExecutor, "run", held_up)
    async with serving(MemoryStore(), resident_layers=1) as layers:
        for name in ("a", "b"):
            await layers.create(name, CONFIG)
        on_a = asyncio.create_task(train(layers, "a", batch(1, rows=4)))
        await computing[4][0].wait()
        on_b = asyncio.create_task(train(layers, "b", batch(2, rows=5)))
        await computing[5][0].wait()
        computing[4][1].set()
        await on_a
        assert (await evaluate(layers, "b", batch(3))).num_batches_tracked == 0
        computing[5][1].set()
        assert (await on_b).num_batches_tracked == 1
        assert (await evaluate(layers, "b", batch(3))).num_batches_tracked == 1
        assert (await layers.get("b")).num_batches_tracked == 1


async def test_only_the_slot_that_was_used_is_dropped_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(MemoryStore()) as layers:
        entries = layers._cache
        with entries.use("a"):
            other = entries._entries["a"] = cache.CacheEntry(
                "a",
                MemoryStore(),
                layers._executor,
                layers._options,
                RUNTIME,
                LayerMetrics(NoMetrics()),
                lambda _: None,
                lambda _: None,
                NoObserver(),
            )
        assert entries.get("a") is other


class _SlowStore(MemoryStore):
    """Each call takes a few turns of the loop, before and after it has an effect."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    async def load(self, *args: Any) -> Any:
        return await self._slowly(super().load(*args))

    async def commit(self, *args: Any) -> Any:
        return await self._slowly(super().commit(*args))

    async def _slowly(self, call: Any) -> Any:
        await turns(self._rng)
        result = await call
        await turns(self._rng)
        return result


async def turns(rng: random.Random) -> None:
    for _ in range(rng.randrange(6)):
        await asyncio.sleep(0)


class _Recorder:
    """Every entry that was ever made, as long as somebody holds it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[weakref.ref[cache.CacheEntry]] = []
        start = cache.CacheEntry.__init__

        def recorded(entry: cache.CacheEntry, *args: Any) -> None:
            start(entry, *args)
            self._made.append(weakref.ref(entry))

        monkeypatch.setattr(cache.CacheEntry, "__init__", recorded)

    def check(self, layers: Layers) -> None:
        """No layer has two entries that are used, have work queued, or stand under its name."""
        known = layers._cache._entries.values()
        made = [entry for ref in self._made if (entry := ref())]
        live = [entry.cached.name for entry in made if entry.users or not entry.queue.idle or entry in known]
        assert len(live) == len(set(live))


async def call(layers: Layers, name: str, rng: random.Random, acknowledged: Counter[str]) -> None:
    """One call of some kind; what it says of the layer is no older than what was acknowledged before it."""
    array, before = batch(1, rows=rng.randrange(2, 5)), acknowledged[name]
    match rng.randrange(5):
        case 0:
            await train(layers, name, array)
            acknowledged[name] += 1
        case 1:
            call = layers.batches.train(name, lambda _: {"input": Tensor.of(array)}, None)
            begun = start(call, asyncio.get_running_loop())
            if isinstance(begun, asyncio.Task):
                await begun
            acknowledged[name] += 1
        case 2:
            assert (await evaluate(layers, name, array)).num_batches_tracked >= before
        case 3:
            assert (await layers.get(name)).num_batches_tracked >= before
            with pytest.raises(errors.LayerNotFound):
                await layers.get("none")
        case _:
            changing = asyncio.create_task(layers.update(name, LayerUpdate(weight=[2.0] * 3), None))
            await turns(rng)
            changing.cancel()  # who has hung up does not count as a user, but what is queued is done all the same
            await asyncio.wait([changing])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("resident_layers", [1, 2, 3])
async def test_no_layer_has_two_queues_and_eval_sees_what_was_acknowledged(
    seed: int, resident_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, recorder, run = random.Random(seed), _Recorder(monkeypatch), ComputeExecutor.run

    async def slowly(self: ComputeExecutor, *args: Any, **kwargs: Any) -> Any:
        await turns(rng)
        return await run(self, *args, **kwargs)

    monkeypatch.setattr(ComputeExecutor, "run", slowly)
    names = [f"n{number}" for number in range(6)]
    acknowledged: Counter[str] = Counter()

    async def caller(layers: Layers) -> None:
        for _ in range(25):
            await call(layers, rng.choice(names), rng, acknowledged)
            recorder.check(layers)
            await turns(rng)

    async with serving(_SlowStore(rng), resident_layers=resident_layers) as layers:
        for name in names:
            await layers.create(name, CONFIG)
        await asyncio.gather(*(caller(layers) for _ in range(4)))
        for name in names:
            assert (await layers.get(name)).num_batches_tracked == acknowledged[name]
            assert (await evaluate(layers, name, batch(1))).num_batches_tracked == acknowledged[name]
        recorder.check(layers)
        assert len(layers._cache) <= resident_layers

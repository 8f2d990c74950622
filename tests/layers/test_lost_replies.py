"""Stores that lose replies, and layers that others change: nothing is folded twice, nothing is lost."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import CONFIG, batch, evaluate, serving, train

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]


class Flaky(MemoryStore):
    """Loses the replies of some calls: before the call took effect, or after."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lose: list[str] = []  # what happens to the next calls: "ok", "before" or "after"

    async def _call(self, method: Any, *args: Any) -> Any:
        fate = self.lose.pop(0) if self.lose else "ok"
        if fate == "before":
            raise StoreError("lost on the way there")
        result = await method(*args)
        if fate == "after":
            raise StoreError("lost on the way back")
        return result

    async def commit(self, *args: Any) -> Any:
        return await self._call(super().commit, *args)

    async def delete(self, *args: Any, **options: Any) -> Any:
        return await self._call(partial(super().delete, **options), *args)


async def _assert_equals_torch(layers: Any, seeds: list[int]) -> None:
    module = nn.BatchNorm1d(3)
    for seed in seeds:
        module(torch.from_numpy(batch(seed)))
    snapshot = await layers.get("a")
    assert snapshot.num_batches_tracked == len(seeds)
    assert np.array_equal(snapshot.tensors["running_mean"].numpy(), module.running_mean.numpy())


@pytest.mark.parametrize("fates", [["after"], ["before"], ["after", "before", "after"], ["before", "after", "after"]])
@pytest.mark.parametrize("key", ["key", None])
async def test_a_fold_whose_reply_is_lost_counts_once(fates: list[str], key: str | None) -> None:
    store = Flaky()
    async with serving(store) as layers:
        await layers.create("a", CONFIG)
        await train(layers, "a", batch(0))
        store.lose = list(fates)
        result = await train(layers, "a", batch(1), key)
        assert (result.num_batches_tracked, result.replayed) == (2, False)
        await train(layers, "a", batch(2))
        await _assert_equals_torch(layers, [0, 1, 2])


async def test_a_call_that_gave_up_is_answered_by_its_repeat(caplog: pytest.LogCaptureFixture) -> None:
    store = Flaky()
    async with serving(store, store_timeout=0.05) as layers:
        await layers.create("a", CONFIG)
        store.lose = ["after"] + ["before"] * 50
        with pytest.raises(errors.StoreUnavailable) as refused:
            await train(layers, "a", batch(1), "key")
        assert refused.value.retry_after
        assert len(caplog.records) == 1, "one line, however many tries"
        assert "the store does not answer" in caplog.text
        store.lose = []
        again = await train(layers, "a", batch(1), "key")
        assert (again.replayed, again.num_batches_tracked) == (True, 1)
        await _assert_equals_torch(layers, [1])


async def test_eval_after_an_unknown_outcome_asks_the_store() -> None:
    """The cache of an exclusive store is trusted, but not after a commit whose outcome nobody knows."""
    store = Flaky()
    async with serving(store, store_timeout=0.05) as layers:
        await layers.create("a", CONFIG)
        store.lose = ["after"] + ["before"] * 50
        with pytest.raises(errors.StoreUnavailable):
            await train(layers, "a", batch(1))
        assert (await evaluate(layers, "a", batch(2))).num_batches_tracked == 1


@pytest.mark.parametrize("fate", ["before", "after"])
async def test_changes_and_deletes_whose_replies_are_lost_happen_once(fate: str) -> None:
    store = Flaky()
    async with serving(store) as layers:
        made, _ = await layers.create("a", CONFIG)
        store.lose = [fate]
        changed = await layers.update("a", LayerUpdate(eps=0.5), frozenset([made.version]))
        assert (changed.version, changed.config.eps) == (made.version + 1, 0.5)
        store.lose = [fate]
        reset, replayed = await layers.reset("a", "all", "key", None)
        assert (reset.version, replayed) == (made.version + 2, False)
        store.lose = [fate]
        await layers.delete("a", frozenset([reset.version]))
        with pytest.raises(errors.LayerNotFound):
            await layers.get("a")


async def test_a_layer_deleted_and_made_again_under_a_stale_cache() -> None:
    """ABA: the other process's cache holds a layer of the same name, config and version count."""
    store = MemoryStore(exclusive=False)
    async with serving(store) as one, serving(store) as other:
        await one.create("a", CONFIG)
        await train(one, "a", batch(1), "key")
        await train(other, "a", batch(2))  # now both hold the layer
        await one.delete("a", None)
        await one.create("a", CONFIG)
        await train(one, "a", batch(3))
        result = await train(other, "a", batch(4), "key")
        assert (result.num_batches_tracked, result.replayed) == (2, False)
        await _assert_equals_torch(one, [3, 4])
        assert (await evaluate(one, "a", batch(5))).version == (await evaluate(other, "a", batch(5))).version


async def test_a_layer_made_again_with_another_config_is_judged_by_that_one() -> None:
    """A stale cache must not refuse a batch that the layer of now takes, nor take one that it refuses."""
    store = MemoryStore(exclusive=False)
    async with serving(store) as one, serving(store) as other:
        await one.create("a", CONFIG)
        await train(other, "a", batch(1))
        await one.delete("a", None)
        await one.create("a", LayerConfig(num_features=5))
        assert (await train(other, "a", batch(2, channels=5))).num_batches_tracked == 1
        await one.delete("a", None)
        await one.create("a", CONFIG)
        with pytest.raises(errors.ShapeMismatch):
            await train(other, "a", batch(2, channels=5))
        await one.delete("a", None)
        with pytest.raises(errors.LayerNotFound):
            await train(other, "a", batch(2))


async def test_every_process_sees_every_acknowledged_fold() -> None:
    store = MemoryStore(exclusive=False)
    async with serving(store) as one, serving(store) as other:
        await one.create("a", CONFIG)
        for index in range(1, 11):
            writer, reader = (one, other) if index % 2 else (other, one)
            trained = await train(writer, "a", batch(index))
            seen = await evaluate(reader, "a", batch(0))
            assert (seen.version, seen.num_batches_tracked) == (trained.version, index)
        await _assert_equals_torch(other, list(range(1, 11)))


async def test_many_racing_writers_over_a_store_that_loses_replies_count_every_batch_once() -> None:
    rng = random.Random(7)
    store = Flaky(exclusive=False)
    async with serving(store) as one, serving(store) as other:
        await one.create("a", CONFIG)
        store.lose = rng.choices(["ok", "before", "after"], [6, 1, 1], k=300)

        async def call(seed: int) -> tuple[int, int]:
            await asyncio.sleep(rng.random() / 20)
            where = rng.choice([one, other])
            key = f"key{seed}" if seed % 2 else None
            return seed, (await train(where, "a", batch(seed), key)).num_batches_tracked

        order = sorted(await asyncio.gather(*(call(seed) for seed in range(100))), key=lambda pair: pair[1])
        assert [number for _, number in order] == list(range(1, 101))
        await _assert_equals_torch(one, [seed for seed, _ in order])


async def test_a_caller_that_goes_away_does_not_stop_the_others() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        tasks = [asyncio.create_task(train(layers, "a", batch(seed))) for seed in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[1], asyncio.CancelledError)
        assert (await train(layers, "a", batch(9))).num_batches_tracked in (3, 4)

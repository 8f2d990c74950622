"""Stacks of moments, and batches that are normalized with the running statistics, in one commit with others."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import IdempotencyKeyReused, InvalidRequest
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import Folded, Layers, Normalized
from batchnorm_service.store.base import Conflict
from batchnorm_service.store.memory import MemoryStore

from .conftest import batch, fold_moments, serving, settle, train

pytestmark = pytest.mark.anyio

POPULATION = LayerConfig(num_features=3, statistics="population", affine=False, momentum=None)
ROWS = 5


class HeldStore(MemoryStore):
    """Commits wait while `held`: what comes meanwhile shares the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.free = asyncio.Event()
        self.free.set()
        self.commits = 0

    async def commit(self, *arguments: Any) -> Any:
        await self.free.wait()
        self.commits += 1
        return await super().commit(*arguments)


async def observe(layers: Layers, array: np.ndarray, key: str | None = None) -> Normalized:
    return await layers.batches.observe("a", lambda _: {"input": Tensor.of(array)}, key)


async def fold_stack(layers: Layers, batches: list[np.ndarray], key: str | None = None) -> Folded:
    wide = [one.astype(np.float64) for one in batches]
    means, variances = np.array([one.mean(0) for one in wide]), np.array([one.var(0) for one in wide])
    return await fold_moments(layers, "a", np.array([len(one) for one in wide]), means, variances, key)


def _output(done: Normalized) -> np.ndarray:
    return done.output.numpy()


def _expected(array: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    samples = np.concatenate(seen).astype(np.float64)
    return (array - samples.mean(0)) / np.sqrt(samples.var(0, ddof=1) + 1e-5)


async def test_each_of_those_that_share_a_commit_gets_the_statistics_right_after_its_own_fold() -> None:
    store = HeldStore()
    async with serving(store) as layers:
        await layers.create("a", POPULATION)
        store.free.clear()
        first = asyncio.create_task(observe(layers, batch(0)))
        await settle()  # its commit is under way; the others share the next
        second = asyncio.create_task(observe(layers, batch(1)))
        stack = asyncio.create_task(fold_stack(layers, [batch(n) for n in range(2, 2 + ROWS)]))
        third = asyncio.create_task(observe(layers, batch(9)))
        other = asyncio.create_task(train(layers, "a", batch(10)))
        await settle()
        store.free.set()
        done = await asyncio.gather(first, second, stack, third, other)
    assert store.commits == 2
    assert [one.num_batches_tracked for one in done] == [1, 2, 2 + ROWS, 3 + ROWS, 4 + ROWS]
    assert [one.version for one in done] == [2, 3, 3, 3, 3]
    seen = [batch(n) for n in range(2 + ROWS)]
    np.testing.assert_allclose(_output(done[0]), _expected(batch(0), seen[:1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_output(done[1]), _expected(batch(1), seen[:2]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_output(done[3]), _expected(batch(9), [*seen, batch(9)]), rtol=1e-4, atol=1e-5)


async def test_after_a_lost_race_it_is_normalized_with_the_winners_batch_counted_in() -> None:
    store = MemoryStore()
    async with serving(store) as layers, serving(store) as others:
        await layers.create("a", POPULATION)
        await observe(layers, batch(0))
        commit = store.commit

        async def lose_once(*arguments: Any) -> Any:
            store.commit = commit  # type: ignore[method-assign]
            await observe(others, batch(1))
            outcome = await commit(*arguments)
            assert isinstance(outcome, Conflict)
            return outcome

        store.commit = lose_once  # type: ignore[method-assign]
        done = await observe(layers, batch(2))
    assert done.num_batches_tracked == 3
    expected = _expected(batch(2), [batch(0), batch(1), batch(2)])
    np.testing.assert_allclose(_output(done), expected, rtol=1e-4, atol=1e-5)


async def test_tracking_that_is_turned_off_meanwhile_refuses_it() -> None:
    store = HeldStore()
    async with serving(store) as layers:
        await layers.create("a", POPULATION)
        store.free.clear()
        off = asyncio.create_task(layers.update("a", LayerUpdate(track_running_stats=False), None))
        await settle()
        late = asyncio.create_task(observe(layers, batch(0), "k"))
        await settle()
        store.free.set()
        await off
        with pytest.raises(InvalidRequest, match="tracks none"):
            await late
        assert (await layers.get("a")).num_batches_tracked == 0


@pytest.mark.parametrize("config", [LayerConfig(num_features=3), POPULATION], ids=["moving", "population"])
async def test_the_same_key_twice_in_one_commit_is_one_fold(config: LayerConfig) -> None:
    store = HeldStore()
    stack = [batch(n) for n in range(ROWS)]
    async with serving(store) as layers:
        await layers.create("a", config)
        store.free.clear()
        await settle()
        first = asyncio.create_task(train(layers, "a", batch(9)))
        await settle()
        calls = [asyncio.create_task(fold_stack(layers, stack, "k")) for _ in range(2)]
        reused = asyncio.create_task(fold_stack(layers, stack[:2], "k"))
        await settle()
        store.free.set()
        await first
        done = await asyncio.gather(*calls)
        with pytest.raises(IdempotencyKeyReused):
            await reused
        assert [one.replayed for one in done] == [False, True]
        assert {one.num_batches_tracked for one in done} == {1 + ROWS}
        assert {one.rows for one in done} == {ROWS}
        assert (await layers.get("a")).num_batches_tracked == 1 + ROWS


async def test_a_refused_stack_keeps_no_other_from_being_folded() -> None:
    store = HeldStore()
    async with serving(store) as layers:
        await layers.create("a", LayerConfig(num_features=3))
        huge = np.zeros((2, 3))
        huge[1] = 1e300  # fits float64, and no running mean in float32
        store.free.clear()
        before = asyncio.create_task(train(layers, "a", batch(0)))
        await settle()
        bad = asyncio.create_task(fold_moments(layers, "a", np.array([4, 4]), huge, np.ones((2, 3))))
        good = asyncio.create_task(fold_stack(layers, [batch(1), batch(2)]))
        await settle()
        store.free.set()
        await before
        with pytest.raises(Exception, match="row 1: the folded running_mean"):
            await bad
        assert (await good).num_batches_tracked == 3

"""A hot layer that several replicas train at once: few round trips, no one left behind, nothing folded twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from batchnorm_service.layers.rivals import Rivals
from batchnorm_service.store.base import Committed, Conflict, Record, Store
from layers.conftest import CONFIG, batch, serving, train
from store.counted import Counted
from store.harness import after, created

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def racing(make_store: Callable[[], Store], replicas: int) -> AsyncIterator[tuple[list[Any], list[Counted]]]:
    """Replicas that all know the layer, and their stores, which count from now on."""
    async with AsyncExitStack() as stack:
        stores = [Counted(make_store()) for _ in range(replicas)]
        services = [await stack.enter_async_context(serving(store)) for store in stores]  # type: ignore[arg-type]
        await services[0].create("a", CONFIG)
        for service in services:
            await service.get("a")
        for store in stores:
            store.counts.clear()
        yield services, stores


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
async def test_everyone_is_answered_and_groups_are_committed_together(
    make_store: Callable[[], Store], replicas: int
) -> None:
    callers, calls = 8, 5

    async with racing(make_store, replicas) as (services, stores):

        async def caller(service: Any) -> list[int]:
            return [(await train(service, "a", batch(step))).num_batches_tracked for step in range(calls)]

        told = await asyncio.gather(*(caller(service) for service in services for _ in range(callers)))
        total = sum((store.counts for store in stores), Counter[str]())
        count = replicas * callers * calls
        assert sorted(number for numbers in told for number in numbers) == list(range(1, count + 1))
        assert (await services[-1].get("a")).num_batches_tracked == count
    trips = (total["commit"] + total["load"]) / count
    assert total["commit"] - total["conflict"] <= count / 2, "most commits are of a group"
    assert trips < 2, total  # each call for itself, and no race at all, would be 1


async def test_the_more_wait_the_fewer_commits_each_takes(make_store: Callable[[], Store]) -> None:
    per_call = {}
    for callers in (1, 16):
        async with racing(make_store, 3) as (services, stores):
            await asyncio.gather(*(train(service, "a", batch(1)) for service in services for _ in range(callers)))
            total = sum((store.counts for store in stores), Counter[str]())
            per_call[callers] = total["commit"] / (3 * callers)
            await services[0].delete("a", None)
    assert per_call[16] < per_call[1]


async def test_who_lost_a_race_need_not_load_what_won_it(make_store: Callable[[], Store]) -> None:
    async with racing(make_store, 2) as ((first, second), (_, store)):
        await train(first, "a", batch(1))
        assert (await train(second, "a", batch(2))).num_batches_tracked == 2
        assert store.counts == Counter(commit=2, conflict=1)


async def test_a_conflict_tells_the_record_of_the_same_incarnation_only(make_store: Callable[[], Store]) -> None:
    store = make_store()
    await store.open()
    try:
        first = await created(store, "a")
        second = after(first, b"second")
        assert await store.commit("a", first.stamp, second, []) == Committed()
        for new in (after(first, b"late"), None):
            answer = await store.commit("a", first.stamp, new, [])
            assert isinstance(answer, Conflict)
            assert answer.record == second
        elsewhere = await store.commit("a", first.stamp._replace(incarnation=1), Record(first.stamp, b""), [])
        assert isinstance(elsewhere, Conflict)
        assert elsewhere.record is None
    finally:
        await store.close()


def test_who_is_alone_never_waits_and_nobody_waits_long() -> None:
    rivals = Rivals()
    rivals.took(0.002)
    assert rivals.after_winning() == 0
    rivals.lost()
    assert 0.001 <= rivals.after_winning() <= 0.003
    for _ in range(100):
        rivals.took(5.0)
        rivals.passed(1000)
    assert 0 < rivals.after_losing() <= 0.05
    assert 0.025 <= rivals.after_winning() <= 0.05
    for _ in range(10):
        rivals.passed(0)
    assert rivals.after_winning() > 0, "they may only be starved"
    for _ in range(40):
        rivals.passed(0)
    assert rivals.after_winning() == 0, "they have gone"

"""A hot layer that several replicas train at once: few round trips, no one left behind, nothing folded twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from batchnorm_service.layers.contention import ContentionBackoff
from batchnorm_service.store.base import Committed, Conflict, Record, Store
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import CONFIG, batch, serving, train
from replicas import virtual
from store.counted import Counted
from store.harness import Clocks, after, created

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


@pytest.mark.parametrize(
    "trips",
    [[4, 4], [4, 4.2], [4, 4.5, 5, 5.5], [1, 1, 8, 8], [1, 30]],
    ids=["equal", "nearly equal", "spread", "halves", "near and far"],
)
def test_nobody_is_starved(trips: list[float]) -> None:
    """It was so that who had won once went on winning, for as long as nobody else was lucky."""
    commits, losses = virtual.run(_race([trip / 1000 for trip in trips], 160))
    shares = Counter(commits)
    assert len(shares) == len(trips), shares
    if max(trips) < 2 * min(trips):
        assert min(shares.values()) >= max(shares.values()) / 2, shares
    assert max(losses) <= 4 * len(trips), "tries until one wins"


async def _race(trips: list[float], count: int) -> tuple[list[int], list[int]]:
    """Who made each of the first commits, when each replica has two callers that never pause; races lost in a row."""
    time = asyncio.get_running_loop().time
    runtime = Clocks(wall=time, now=time)
    shared = MemoryStore(exclusive=False, runtime=runtime)
    commits: list[int] = []
    lost, losses = [0] * len(trips), [0] * len(trips)

    class Noted:
        def __init__(self, who: int) -> None:
            self._who = who

        def __getattr__(self, name: str) -> Any:
            return getattr(shared, name)

        async def commit(self, *arguments: Any) -> Any:
            answer = await shared.commit(*arguments)
            if isinstance(answer, Committed):
                commits.append(self._who)
                lost[self._who] = 0
            else:
                lost[self._who] += 1
                losses[self._who] = max(losses[self._who], lost[self._who])
            return answer

    async def caller(service: Any) -> None:
        while len(commits) < count:
            await train(service, "a", batch(1))

    async with AsyncExitStack() as stack:
        stores = [virtual.Distant(Noted(who), trip) for who, trip in enumerate(trips)]
        services = [await stack.enter_async_context(serving(store, runtime)) for store in stores]  # type: ignore[arg-type]
        await services[0].create("a", CONFIG)
        await asyncio.gather(*(caller(service) for service in services for _ in range(2)))
    return commits[:count], losses


def _pauses(rivals: ContentionBackoff, told: int | None, losses: int = 0, passed: Sequence[int] = ()) -> list[float]:
    """In turns of a millisecond, when so many others have passed after each pause, and then all."""
    seen = iter([0, *passed])
    return [pytest.approx(1000 * pause) for pause in rivals.pauses(told, losses, lambda: next(seen, 1000))]


def test_a_winner_gives_way_a_turn_for_each_that_waits() -> None:
    rivals = ContentionBackoff()
    rivals.record_duration(0.001)
    assert _pauses(rivals, 0) == []
    assert _pauses(rivals, 0, losses=3) == []
    assert _pauses(rivals, 1) == [1]
    assert _pauses(rivals, 7, losses=3) == [7]
    rivals.record_duration(0.002)
    assert _pauses(rivals, 1) == [1.2], "a turn is what turns took lately"


def test_a_winner_waits_for_those_that_are_farther_away_each_time_longer() -> None:
    rivals = ContentionBackoff()
    rivals.record_duration(0.001)
    assert _pauses(rivals, 1, passed=[0, 0, 0]) == [1, 2, 4, 8]
    assert _pauses(rivals, 3, passed=[1, 2, 2, 3]) == [3, 4, 4, 8]
    pauses = list(rivals.pauses(1, 0, lambda: 0))
    assert len(pauses) == 8
    assert sum(pauses) == pytest.approx(0.2), "but not for ever"


def test_one_that_never_comes_is_waited_for_once() -> None:
    rivals = ContentionBackoff()
    rivals.record_duration(0.001)
    assert sum(rivals.pauses(2, 0, lambda: 0)) == pytest.approx(0.2)
    assert _pauses(rivals, 2) == [], "both have died or given up"
    assert _pauses(rivals, 3) == [1], "a third has come, and passes: so may they"
    assert _pauses(rivals, 2) == [2]
    assert sum(rivals.pauses(1, 0, lambda: 0)) == pytest.approx(0.2)
    assert _pauses(rivals, 0) == []
    assert _pauses(rivals, 1) == [1], "the store had forgotten the one that died"


def test_where_the_store_does_not_tell_rivals_are_guessed_and_forgotten_slowly() -> None:
    rivals = ContentionBackoff()
    rivals.record_duration(0.001)
    assert _pauses(rivals, None) == []
    assert _pauses(rivals, None, losses=3, passed=[0]) == [3], "those may have gone"
    assert _pauses(rivals, None) == [3 * 0.875], "or be starved"
    assert _pauses(rivals, None, losses=4) == [4]
    assert _pauses(rivals, None, losses=1) == [3.5], "who lost once has not met them all"
    for _ in range(40):
        last = _pauses(rivals, None)
    assert last == [], "they have gone"


def test_nobody_gives_way_for_long() -> None:
    rivals = ContentionBackoff()
    rivals.record_duration(5.0)
    assert list(rivals.pauses(1000, 0, lambda: 0)) == [0.2]
    assert list(rivals.pauses(None, 1000, lambda: 0)) == [0.2]
    after = ContentionBackoff()
    after.record_duration(5.0)
    after.record_duration(0.0)
    assert _pauses(after, 1) == [160], "a store that was away counts as the longest turn"
    assert sum(ContentionBackoff().pauses(1, 0, lambda: 0)) == pytest.approx(0.2), (
        "nor for ever, where a turn took no time at all"
    )

"""Calls through any replica are as if one layer answered them one after the other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import httpx
import pytest

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import Store
from batchnorm_service.store.memory import MemoryStore

from .conftest import running
from .history import Event, faults

pytestmark = pytest.mark.anyio

LAYER = "/v1/layers/shared"
CALLERS, CALLS = 8, 30


class Recorder:
    """Calls replicas, and notes what they answered and when."""

    def __init__(self) -> None:
        self.history: list[Event] = []
        self._clock = count()

    async def call(self, replica: httpx.AsyncClient, kind: str, seed: int = 0) -> Event:
        began = next(self._clock)
        body = {"input": [[seed + 1.0, 2.0], [3.0, seed + 4.0], [5.0, 9.0]]}
        answer = (await replica.post(f"{LAYER}/{kind}", json=body)).raise_for_status().json()
        event = Event(kind, began, next(self._clock), answer["version"], answer["num_batches_tracked"])
        self.history.append(event)
        return event


async def test_histories_through_three_replicas_are_those_of_one_layer(replicas: list[httpx.AsyncClient]) -> None:
    (await replicas[0].put(LAYER, json={"num_features": 2})).raise_for_status()
    recorder = Recorder()

    async def caller(number: int) -> None:
        rng = random.Random(number)
        for step in range(CALLS):
            kind = "train" if rng.random() < 0.5 else "eval"
            await recorder.call(rng.choice(replicas), kind, 100 * number + step)

    await asyncio.gather(*map(caller, range(CALLERS)))
    assert len(recorder.history) == CALLERS * CALLS
    assert faults(recorder.history) == []


async def test_a_caller_sees_its_own_update_through_another_replica(replicas: list[httpx.AsyncClient]) -> None:
    (await replicas[0].put(LAYER, json={"num_features": 2})).raise_for_status()
    recorder = Recorder()
    for step in range(12):
        trained = await recorder.call(replicas[step % 3], "train", step)
        seen = await recorder.call(replicas[(step + 1) % 3], "eval")
        assert (seen.version, seen.batch) == (trained.version, trained.batch)
    assert faults(recorder.history) == []


async def test_staleness_is_allowed_up_to_the_setting(
    make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(Runtime, "now", lambda _: clock.now)
    recorder = Recorder()
    async with running([make_store() for _ in range(2)], max_staleness_ms=60_000) as (writer, reader):
        (await writer.put(LAYER, json={"num_features": 2})).raise_for_status()
        first = await recorder.call(reader, "eval")
        trained = await recorder.call(writer, "train")
        clock.now += 59
        stale = await recorder.call(reader, "eval")
        assert (stale.version, stale.batch) == (first.version, 0)
        assert any("stale" in fault for fault in faults(recorder.history)), "the checker sees it"
        clock.now += 2
        fresh = await recorder.call(reader, "eval")
        assert (fresh.version, fresh.batch) == (trained.version, 1)
        again = await recorder.call(reader, "train")  # a commit checks whatever the setting
        assert again.batch == 2
        assert (await recorder.call(reader, "eval")).batch == 2, "its own commits a replica always knows"


async def test_a_replica_that_does_not_ask_is_caught() -> None:
    """A store that says it is exclusive and is not: what freshness is for."""
    store = MemoryStore(exclusive=True)
    recorder = Recorder()
    async with running([store, store]) as replicas:
        (await replicas[0].put(LAYER, json={"num_features": 2})).raise_for_status()
        for step in range(6):
            await recorder.call(replicas[step % 2], "eval")
            await recorder.call(replicas[0], "train", step)
    assert any("stale" in fault for fault in faults(recorder.history))


def _train(began: int, ended: int, version: int, batch: int) -> Event:
    return Event("train", began, ended, version, batch)


def _eval(began: int, ended: int, version: int, batch: int) -> Event:
    return Event("eval", began, ended, version, batch)


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ([_train(0, 1, 2, 1), _eval(2, 3, 1, 0)], "stale"),
        ([_train(0, 3, 2, 1), _eval(1, 2, 2, 1), _eval(4, 5, 1, 0)], "stale"),
        ([_train(0, 9, 2, 1), _eval(1, 2, 2, 1), _eval(3, 4, 1, 0)], "stale"),  # two evals, the later one older
        ([_train(0, 1, 2, 1), _train(2, 3, 3, 3)], "gap"),
        ([_train(0, 1, 2, 1), _train(0, 1, 2, 1)], "repeat"),
        ([_train(0, 1, 3, 1), _train(0, 1, 2, 2)], "do not follow"),
        ([_train(0, 1, 3, 2), _train(2, 3, 3, 1)], "folded before"),
        ([_train(0, 1, 3, 1), _eval(2, 3, 3, 0)], "no commit"),
    ],
)
def test_the_checker_finds_what_one_layer_cannot_have_done(history: list[Event], fault: str) -> None:
    assert any(fault in found for found in faults(history))


def test_the_checker_accepts_what_one_layer_may_have_done() -> None:
    together = [_train(0, 5, 2, 1), _train(1, 4, 2, 2), _eval(2, 6, 1, 0), _eval(3, 7, 2, 2), _train(8, 9, 3, 3)]
    assert faults(together) == []
    assert faults([]) == []

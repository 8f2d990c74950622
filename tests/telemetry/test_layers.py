"""What layers and stores report: every number is that of a scenario which determines it."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from batchnorm_service.app import create_app
from batchnorm_service.layers import GroupCall, Layers, LayersOptions
from batchnorm_service.runtime import RUNTIME
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.measured import measured
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.telemetry import Metrics
from layers.conftest import CONFIG, batch, evaluate, settle, train
from rest.conftest import by_asgi

from .reading import by, metrics, read, total

pytestmark = [pytest.mark.anyio, by_asgi]


def new_metrics():
    return Metrics({"route": ("other",), "version": ("0",), "python": ("0",), "torch": ("0",)})


def told(reported):
    reported.read_gauges()
    return read(reported.render("")[0].decode())


@asynccontextmanager
async def serving(store, reported, **options):
    await store.open()
    layers = Layers(measured(store, reported), LayersOptions(**options), RUNTIME, reported)
    await layers.open()
    try:
        yield layers
    finally:
        await layers.close()
        await store.close()


async def test_folds_that_wait_together_are_one_commit(way):
    reported, store = new_metrics(), HeldUp()
    async with serving(store, reported) as layers:
        await layers.create("a", CONFIG)
        store.gate.clear()
        calls = [asyncio.create_task(train(layers, "a", batch(n))) for n in range(8)]
        await settle()
        found = told(reported)
        assert total(found, "batchnorm_queued_updates") == 7  # the first is being committed
        assert total(found, "batchnorm_commits_total") == total(found, "batchnorm_folds_total") == 0
        store.gate.set()
        await asyncio.gather(*calls)
    found = told(reported)
    assert total(found, "batchnorm_queued_updates") == 0
    assert total(found, "batchnorm_folds_total") == 8
    assert by(found, "batchnorm_commits_total", "update") == {("folds",): 2}
    assert total(found, "batchnorm_receipts_total") == 8
    buckets = by(found, "batchnorm_folds_per_commit_bucket", "le")
    assert (buckets["1.0",], buckets["4.0",], buckets["8.0",], buckets["+Inf",]) == (1, 1, 2, 2)
    assert total(found, "batchnorm_folds_per_commit_sum") == 8


class HeldUp(MemoryStore):
    """Commits wait for the gate."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = asyncio.Event()
        self.gate.set()

    async def commit(self, *args):
        await self.gate.wait()
        return await super().commit(*args)


async def test_changes_receipts_and_repeats(way):
    reported = new_metrics()
    async with serving(MemoryStore(), reported) as layers:
        await layers.create("a", CONFIG)
        for _ in range(3):
            await train(layers, "a", batch(1), "key")
        await layers.reset("a", "all", None, None)
        await evaluate(layers, "a", batch(1))
        await layers.delete("a", None)
    found = told(reported)
    assert total(found, "batchnorm_folds_total") == 1
    assert by(found, "batchnorm_commits_total", "update") == {("folds",): 1, ("change",): 1}
    assert total(found, "batchnorm_receipts_total") == 2
    assert by(found, "batchnorm_store_seconds_count", "operation", "result") == {
        ("create", "record"): 1,
        ("load", "record"): 1,
        ("commit", "committed"): 2,
        ("commit", "duplicates"): 2,
        ("delete", "committed"): 1,
    }


async def test_a_layer_that_does_not_track_folds_nothing(way):
    reported = new_metrics()
    async with serving(MemoryStore(), reported) as layers:
        await layers.create("a", CONFIG.model_copy(update={"track_running_stats": False}))
        await train(layers, "a", batch(1), "key")
    found = told(reported)
    assert total(found, "batchnorm_folds_total") == total(found, "batchnorm_folds_per_commit_count") == 0
    assert total(found, "batchnorm_receipts_total") == 1


async def test_a_commit_that_comes_second_is_a_conflict(way):
    first, second = new_metrics(), new_metrics()
    store = MemoryStore(exclusive=False)
    async with serving(store, first) as one, serving(store, second) as other:
        await one.create("a", CONFIG)
        for layers in (one, other):
            await evaluate(layers, "a", batch(1))
        await train(one, "a", batch(1))
        await train(other, "a", batch(2))
    assert by(told(first), "batchnorm_conflicts_total", "update") == {}
    found = told(second)
    assert by(found, "batchnorm_conflicts_total", "update") == {("folds",): 1}
    assert by(found, "batchnorm_commits_total", "update") == {("folds",): 1}
    assert total(found, "batchnorm_store_seconds_count", operation="commit", result="conflict") == 1
    assert total(found, "batchnorm_folds_total") == 1


async def test_lookups_with_and_without_the_store(way):
    reported, store = new_metrics(), MemoryStore()
    async with serving(store, reported, resident_layers=2) as layers:
        for name in "abc":
            await layers.create(name, CONFIG)
            await evaluate(layers, name, batch(1))
        assert by(told(reported), "batchnorm_cache_lookups_total", "lookup") == {("miss",): 3}
        assert total(told(reported), "batchnorm_resident_layers") == 2
        for name in "bcb":
            await evaluate(layers, name, batch(1))
        assert by(told(reported), "batchnorm_cache_lookups_total", "lookup") == {("miss",): 3, ("hit",): 3}
        store.exclusive = False
        await evaluate(layers, "b", batch(1))
        assert by(told(reported), "batchnorm_cache_lookups_total", "lookup") == {("miss",): 4, ("hit",): 3}
        assert total(told(reported), "batchnorm_store_seconds_count", operation="load", result="unchanged") == 1


async def test_a_store_that_fails(way, monkeypatch):
    reported, store = new_metrics(), MemoryStore()

    async def unavailable(*_):
        raise StoreError("away")

    async with serving(store, reported) as layers:
        monkeypatch.setattr(store, "ping", unavailable)
        with pytest.raises(Exception, match="away"):
            await layers.ping()
        monkeypatch.setattr(store, "ping", asyncio.Event().wait)
        call = asyncio.create_task(layers.ping())
        await settle()
        call.cancel()
        await asyncio.wait([call])
    assert by(told(reported), "batchnorm_store_seconds_count", "operation", "result") == {
        ("ping", "error"): 1,
        ("ping", "cancelled"): 1,
    }


async def test_members_that_wait_for_their_group(way):
    reported = new_metrics()
    async with serving(MemoryStore(), reported) as layers:
        for name in "ab":
            await layers.create(name, CONFIG)
        group = GroupCall("g", 2)
        calls = [asyncio.create_task(train(layers, name, batch(1), group=group)) for name in "ab"]
        await settle()
        assert total(told(reported), "batchnorm_waiting_in_groups") == 2
        await asyncio.gather(*(train(layers, name, batch(2), group=group) for name in "ab"), *calls)
        found = told(reported)
        assert total(found, "batchnorm_waiting_in_groups") == 0
        assert total(found, "batchnorm_folds_total") == 2


async def test_the_build(way, client):
    found = await metrics(client)
    ((series, value),) = [(dict(pairs), value) for (name, pairs), value in found.items() if "build_info" in name]
    assert value == 1
    assert series["version"] == create_app(Settings(), MemoryStore()).app.version
    assert total(found, "batchnorm_workers") == total(found, "batchnorm_worker_starts_total") == 1

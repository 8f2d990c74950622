"""Drift of layers: what is measured, how it is kept in the store, and what several processes make of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import LayerNotFound, StoreUnavailable
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import DriftOptions, DriftReport, Layers
from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import Attachment, StoreError
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import CONFIG, evaluate, fold_moments, serving, train

pytestmark = pytest.mark.anyio

EVERYTHING = DriftOptions(share=1.0, seconds=3600.0)
"""Every batch is measured, and saved with the first one, or when the layers are closed."""


class Stepped(Runtime):
    """A clock that stands still."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.now = lambda: self.at  # type: ignore[method-assign]


@asynccontextmanager
async def layers_of(
    store: MemoryStore | None = None, drift: DriftOptions | None = EVERYTHING, runtime: Runtime = RUNTIME
) -> AsyncIterator[Layers]:
    async with serving(store or MemoryStore(), runtime, drift=drift) as layers:
        await layers.create("a", CONFIG)
        yield layers


def batches(count: int, mean: float = 0.0, rows: int = 32, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(mean, 1, (rows, 3)).astype(np.float32) for _ in range(count)]


async def trained(layers: Layers, count: int = 40) -> None:
    for batch in batches(count):
        await train(layers, "a", batch)


async def evaluated(layers: Layers, count: int, mean: float = 0.0, **options: Any) -> None:
    for batch in batches(count, mean, seed=count):
        read = {"input": Tensor.of(batch)}
        await layers.batches.eval("a", lambda _, read=read: read, **options)


def shown(report: DriftReport) -> tuple[int, bool]:
    return report.drift.batches, report.since is not None


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - polls what has no event
        await asyncio.sleep(0.001)


# ---------------------------------------------------------------------------------------------------- what is measured


async def test_batches_that_are_folded_and_those_that_are_not_are_measured() -> None:
    async with layers_of() as layers:
        assert shown(await layers.drift.read("a")) == (0, False)
        await trained(layers)
        assert shown(await layers.drift.read("a")) == (39, False)  # the first batch met a layer that knew nothing
        await evaluated(layers, 10, 5.0)
        report = await layers.drift.read("a")
        assert shown(report) == (49, True)
        assert report.drift.z.min() > 3
        await evaluated(layers, 30)
        assert shown(await layers.drift.read("a")) == (79, False)


async def test_nothing_is_measured_where_drift_is_off() -> None:
    async with layers_of(drift=None) as layers:
        await trained(layers)
        await evaluated(layers, 10, 5.0)
        report = await layers.drift.read("a")
        assert (shown(report), report.drift.worst) == ((0, False), None)


async def test_a_share_of_nothing_measures_folded_batches_only() -> None:
    async with layers_of(drift=DriftOptions(share=0.0)) as layers:
        await trained(layers)
        await evaluated(layers, 10, 5.0)
        assert shown(await layers.drift.read("a")) == (39, False)


async def test_a_repeated_batch_is_measured_once() -> None:
    async with layers_of() as layers:
        await trained(layers)
        for _ in range(5):
            await train(layers, "a", batches(1)[0], "key")
        assert shown(await layers.drift.read("a")) == (40, False)


async def test_moments_and_stacks_are_measured() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await fold_moments(layers, "a", 10, np.zeros(3), np.ones(3))
        await fold_moments(layers, "a", np.full(1000, 10), np.full((1000, 3), 5.0), np.ones((1000, 3)))
        assert shown(await layers.drift.read("a")) == (1040, True)


async def test_a_layer_that_does_not_track_is_compared_with_what_it_knew() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await layers.update("a", LayerUpdate(track_running_stats=False), None)
        for number, batch in enumerate(batches(10, 5.0)):
            await train(layers, "a", batch, f"key-{number}" if number % 2 else None)
        assert shown(await layers.drift.read("a")) == (49, True)


async def test_a_layer_without_running_statistics_has_no_drift() -> None:
    async with layers_of() as layers:
        await layers.create("b", LayerConfig(num_features=3, track_running_stats=False))
        await train(layers, "b", batches(1)[0])
        await evaluate(layers, "b", batches(1)[0])
        report = await layers.drift.read("b")
        assert (shown(report), report.drift.z.tolist()) == ((0, False), [0.0] * 3)


async def test_empty_batches_are_not_measured() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await evaluate(layers, "a", np.zeros((0, 3), np.float32))
        assert shown(await layers.drift.read("a")) == (39, False)


async def test_large_batches_are_measured_in_a_thread() -> None:
    async with serving(MemoryStore(), drift=EVERYTHING, inline_bytes=0) as layers:
        await layers.create("a", CONFIG)
        await trained(layers)
        await evaluated(layers, 1, 5.0)
        await until(lambda: layers.drift._measuring is None)
        assert shown(await layers.drift.read("a"))[0] == 40


async def test_evals_are_measured_as_the_clock_allows() -> None:
    """The budget of a stopped clock ends; it comes back with the time, for a layer that was not seen even sooner."""
    clock = Stepped()
    async with layers_of(drift=DriftOptions(share=0.5, seconds=0.0), runtime=clock) as layers:
        await layers.create("rare", CONFIG)
        await trained(layers, 2)
        await train(layers, "rare", batches(1)[0])
        await evaluated(layers, 3000)
        busy = (await layers.drift.read("a")).drift.batches
        assert 100 < busy < 2000
        await evaluated(layers, 10)
        assert (await layers.drift.read("a")).drift.batches == busy
        await evaluate(layers, "rare", batches(1)[0])
        assert (await layers.drift.read("rare")).drift.batches == 1
        clock.at += 60
        await evaluated(layers, 10)
        assert (await layers.drift.read("a")).drift.batches == busy + 10


async def test_of_more_batches_than_can_wait_the_newest_are_measured() -> None:
    async with layers_of() as layers:
        await trained(layers)
        many = np.concatenate([np.full((60_000, 3), 50.0), np.zeros((500, 3))])
        await fold_moments(layers, "a", np.full(60_500, 10), many, np.ones((60_500, 3)))
        report = await layers.drift.read("a")
        assert report.drift.batches == 60_539
        assert np.abs(report.drift.z).max() < 12  # of the statistics before the stack
        assert layers.drift._waiting["a"].all.nbytes < 1 << 20


# ---------------------------------------------------------------------------------------------------- other statistics


async def test_a_reset_starts_anew() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await evaluated(layers, 10, 5.0)
        await layers.reset("a", "parameters", None, None)
        assert shown(await layers.drift.read("a")) == (49, True)
        await layers.reset("a", "all", None, None)
        assert shown(await layers.drift.read("a")) == (0, False)
        await trained(layers)
        assert shown(await layers.drift.read("a")) == (39, False)


async def test_so_do_a_rollback_and_other_tensors() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await layers.history.pin("a", "good", None, None)
        for start in (
            lambda: layers.rollback("a", "good", None, None),
            lambda: layers.replace_state("a", lambda _: {"running_mean": Tensor.of(np.full(3, 5.0, np.float32))}, None),
        ):
            await evaluated(layers, 10, 9.0)
            assert (await layers.drift.read("a")).since is not None
            await start()
            assert shown(await layers.drift.read("a")) == (0, False)
        await evaluated(layers, 10, 5.0)
        assert shown(await layers.drift.read("a")) == (10, False)
        await evaluated(layers, 10, 0.0)
        assert shown(await layers.drift.read("a")) == (20, True)


async def test_weight_and_bias_do_not_matter() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await layers.update("a", LayerUpdate(weight=[3.0] * 3, bias=[9.0] * 3, momentum=0.5), None)
        tensors = {"weight": Tensor.of(np.full(3, 7.0, np.float32))}
        await layers.replace_state("a", lambda _: tensors, None)
        assert shown(await layers.drift.read("a")) == (39, False)


async def test_evals_of_a_kept_state_are_compared_with_that_state() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await layers.history.pin("a", "old", None, None)
        await layers.reset("a", "running_stats", None, None)
        for batch in batches(40, 5.0):
            await train(layers, "a", batch)
        await evaluated(layers, 20, 0.0, at="old")
        assert shown(await layers.drift.read("a")) == (59, False)
        await evaluated(layers, 20, 5.0, at="old")
        assert shown(await layers.drift.read("a")) == (79, True)


async def test_a_deleted_layer_takes_its_drift_along() -> None:
    async with layers_of() as layers:
        await trained(layers)
        await evaluated(layers, 10, 5.0)
        await layers.delete("a", None)
        with pytest.raises(LayerNotFound):
            await layers.drift.read("a")
        await layers.create("a", LayerConfig(num_features=5))
        assert shown(await layers.drift.read("a")) == (0, False)
        await train(layers, "a", np.ones((4, 5), np.float32))
        await evaluate(layers, "a", np.ones((4, 5), np.float32))
        report = await layers.drift.read("a")
        assert (report.drift.batches, len(report.drift.z)) == (1, 5)


# ---------------------------------------------------------------------------------------------------- the store


async def test_drift_outlives_the_process() -> None:
    store = MemoryStore()
    async with layers_of(store) as layers:
        await trained(layers)
        await evaluated(layers, 10, 5.0)
        before = await layers.drift.read("a")
    async with layers_of(store) as layers:
        after = await layers.drift.read("a")
    assert shown(after) == (49, True)
    np.testing.assert_allclose(after.drift.z, before.drift.z, rtol=1e-6)
    np.testing.assert_allclose(after.drift.score, before.drift.score, rtol=1e-4)


async def test_small_batches_that_wait_to_be_joined_are_saved_at_the_end() -> None:
    store = MemoryStore()
    async with layers_of(store) as layers:
        await trained(layers)
        for row in batches(1, rows=3)[0]:
            await evaluate(layers, "a", row[None])
        assert (await layers.drift.read("a")).drift.batches == 42
    async with layers_of(store) as layers:
        assert (await layers.drift.read("a")).drift.batches == 42


async def test_processes_share_one_drift() -> None:
    store = MemoryStore(exclusive=False)
    async with AsyncExitStack() as stack:
        options = DriftOptions(share=1.0, seconds=0.0)
        several = [await stack.enter_async_context(layers_of(store, options)) for _ in range(3)]
        await trained(several[0])
        for number, batch in enumerate(batches(30, 5.0)):
            await evaluate(several[number % 3], "a", batch)
        await until(lambda: not any(layers.drift._due or layers.drift._saving for layers in several))
        reports = [await layers.drift.read("a") for layers in several]
        assert [shown(report) for report in reports] == [(69, True)] * 3
        assert len({report.drift.score for report in reports}) == 1
        assert len({report.since for report in reports}) == 1


async def test_a_reader_sees_what_its_process_has_not_saved() -> None:
    async with layers_of(MemoryStore(exclusive=False)) as layers:
        await trained(layers)
        tags = set()
        for number in range(5):
            report = await layers.drift.read("a")
            assert report.drift.batches == 39 + number
            assert report.tag == (await layers.drift.read("a")).tag
            tags.add(report.tag)
            await evaluated(layers, 1)
        assert len(tags) == 5


class _Trouble(MemoryStore):
    """Its attachments cannot be read or written while it is `down`."""

    down = False
    attached = 0

    async def attachment(self, name: str, incarnation: int, key: str) -> Any:
        if self.down:
            raise StoreError("down")
        return await super().attachment(name, incarnation, key)

    async def attach(self, name: str, incarnation: int, key: str, new: Attachment, expected: int | None) -> Any:
        if self.down:
            raise StoreError("down")
        self.attached += 1
        return await super().attach(name, incarnation, key, new, expected)


async def test_what_cannot_be_saved_is_saved_later(caplog: pytest.LogCaptureFixture) -> None:
    store = _Trouble()
    async with layers_of(store, DriftOptions(share=1.0, seconds=0.0)) as layers:
        await trained(layers, 2)
        await until(lambda: store.attached > 0)
        store.down = True
        await evaluated(layers, 5)
        await until(lambda: "could not be saved" in caplog.text)
        with pytest.raises(StoreUnavailable):
            await layers.drift.read("a")
        await train(layers, "a", batches(1)[0])  # the layer itself can be used
        store.down = False
        assert (await layers.drift.read("a")).drift.batches == 7
    async with layers_of(store) as layers:
        assert (await layers.drift.read("a")).drift.batches == 7


async def test_a_layer_is_saved_once_in_an_interval() -> None:
    store = _Trouble()
    async with layers_of(store, DriftOptions(share=1.0, seconds=3600.0)) as layers:
        await trained(layers)
        await until(lambda: store.attached > 0)
        for _ in range(5):
            await evaluated(layers, 5)
            await asyncio.sleep(0.03)
        assert store.attached == 1
    assert store.attached == 2


async def test_what_is_damaged_is_measured_anew() -> None:
    store = MemoryStore()
    async with layers_of(store) as layers:
        await trained(layers)
    incarnation = store._records["a"].stamp.incarnation
    for data in (b"", b"damaged", store._attachments[incarnation]["drift"].data[:-1]):
        store._attachments[incarnation]["drift"] = Attachment(5, data)
        async with layers_of(store) as layers:
            await evaluated(layers, 3)
            assert (await layers.drift.read("a")).drift.batches == 3


async def test_passing_the_threshold_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with layers_of(drift=DriftOptions(share=1.0, seconds=0.0)) as layers:
        await trained(layers)
        for mean in (0.0, 5.0, 0.0):
            await evaluated(layers, 40, mean)
            await until(lambda: not layers.drift._saving)
    lines = [record.getMessage().partition(":")[0] for record in caplog.records if "drifts" in record.getMessage()]
    assert lines == ["layer 'a' drifts", "layer 'a' drifts no longer"]


async def test_the_threshold_is_that_of_the_options() -> None:
    store = MemoryStore()
    for threshold, drifting in ((0.5, True), (100.0, False)):
        async with layers_of(store, DriftOptions(threshold, 1.0, 3600.0)) as layers:
            await trained(layers)
            await evaluated(layers, 10, 5.0)
            report = await layers.drift.read("a")
            assert (report.threshold, report.since is not None) == (threshold, drifting)
            await layers.reset("a", "all", None, None)

"""Calls on named layers: what they answer, what they refuse, and that nothing else changes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.moments import Moments
from batchnorm_service.engine.state import LayerState
from batchnorm_service.layers import group_commit as plan
from batchnorm_service.store.base import Duplicates, Receipt
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import CONFIG, batch, evaluate, fold_moments, serving, settle, train

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]


async def test_concurrent_batches_are_folded_in_one_order_that_torch_repeats() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        results = await asyncio.gather(*(train(layers, "a", batch(seed)) for seed in range(20)))
        assert sorted(result.num_batches_tracked for result in results) == list(range(1, 21))
        module = nn.BatchNorm1d(3)
        for seed, result in sorted(enumerate(results), key=lambda pair: pair[1].num_batches_tracked):
            expected = module(torch.from_numpy(batch(seed)))
            assert np.array_equal(result.output.numpy(), expected.detach().numpy())
        snapshot = await layers.get("a")
        assert np.array_equal(snapshot.tensors["running_mean"].numpy(), module.running_mean.numpy())
        assert snapshot.samples_tracked == 160
        assert snapshot.version == max(result.version for result in results)


async def test_what_waits_shares_a_commit() -> None:
    commits = 0

    class Counting(MemoryStore):
        async def commit(self, *args, **kwargs):
            nonlocal commits
            commits += 1
            await asyncio.sleep(0)  # as a disk would, so that others can queue up meanwhile
            return await super().commit(*args, **kwargs)

    async with serving(Counting()) as layers:
        await layers.create("a", CONFIG)
        results = await asyncio.gather(*(train(layers, "a", batch(seed)) for seed in range(50)))
        assert commits < 5
        assert len({result.version for result in results}) == commits


async def test_a_key_counts_a_batch_once_and_the_answer_is_the_first_one() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        first = await train(layers, "a", batch(1), "key")
        await train(layers, "a", batch(2), "other")
        again = await train(layers, "a", batch(1), "key")
        assert (again.replayed, again.version, again.num_batches_tracked) == (True, first.version, 1)
        assert bytes(again.output.buffer) == bytes(first.output.buffer)
        assert (await layers.get("a")).num_batches_tracked == 2


async def test_the_same_key_twice_at_once_is_one_fold() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        results = await asyncio.gather(*(train(layers, "a", batch(1), "key") for _ in range(10)))
        assert sorted(result.replayed for result in results) == [False] + [True] * 9
        assert {(result.version, result.num_batches_tracked) for result in results} == {(results[0].version, 1)}
        assert (await layers.get("a")).num_batches_tracked == 1


async def test_a_key_for_another_batch_is_refused_at_once_and_later() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        answers = await asyncio.gather(
            train(layers, "a", batch(1), "key"), train(layers, "a", batch(2), "key"), return_exceptions=True
        )
        assert isinstance(answers[1], errors.IdempotencyKeyReused)
        with pytest.raises(errors.IdempotencyKeyReused):
            await train(layers, "a", batch(1).astype(np.float16), "key")
        with pytest.raises(errors.IdempotencyKeyReused):
            await train(layers, "a", batch(1).reshape(8, 3, 1), "key")
        with pytest.raises(errors.IdempotencyKeyReused):
            await layers.reset("a", "running_stats", "key", None)
        assert (await layers.get("a")).num_batches_tracked == 1


async def test_a_replay_is_normalized_with_the_present_weight() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        first = await train(layers, "a", batch(1), "key")
        await layers.update("a", LayerUpdate(weight=[2.0, 2.0, 2.0]), None)
        again = await train(layers, "a", batch(1), "key")
        assert again.replayed
        assert np.array_equal(again.output.numpy(), 2 * first.output.numpy())


async def test_a_keyed_batch_that_tracking_ignores_is_not_folded_by_its_repeat_either() -> None:
    """Else a repeat after tracking was turned on again would change what the first call did not."""
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        off = await layers.update("a", LayerUpdate(track_running_stats=False), None)
        first = await train(layers, "a", batch(1), "key")
        assert (first.version, first.num_batches_tracked, first.replayed) == (off.version, 0, False)
        await layers.update("a", LayerUpdate(track_running_stats=True), None)
        again = await train(layers, "a", batch(1), "key")
        assert (again.version, again.num_batches_tracked, again.replayed) == (off.version, 0, True)
        assert (await layers.get("a")).num_batches_tracked == 0


async def test_training_with_tracking_off_and_no_key_commits_nothing() -> None:
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", LayerConfig(num_features=3, track_running_stats=False))
        result = await train(layers, "a", batch(1))
        assert result.version == made.version == (await layers.get("a")).version
        assert "running_mean" not in made.tensors


async def test_a_weight_that_changes_while_a_batch_waits_is_the_one_that_its_output_has() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        change = asyncio.create_task(layers.update("a", LayerUpdate(weight=[3.0, 3.0, 3.0]), None))
        await asyncio.sleep(0)  # the change is in the queue, the batch is computed under the old weight
        result = await train(layers, "a", batch(1))
        await change
        module = nn.BatchNorm1d(3)
        nn.init.constant_(module.weight, 3.0)
        assert np.array_equal(result.output.numpy(), module(torch.from_numpy(batch(1))).detach().numpy())


async def test_a_batch_that_the_changed_layer_refuses_is_not_folded() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        change = asyncio.create_task(layers.update("a", LayerUpdate(weight=[3e38, 1.0, 1.0]), None))
        await asyncio.sleep(0)
        with pytest.raises(errors.NonFinite):
            await train(layers, "a", np.concatenate([batch(1) * 0, batch(1)]))
        assert (await layers.get("a")).num_batches_tracked == 0
        await change


async def test_one_bad_batch_among_many_is_refused_alone() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        bad = batch(1) * np.float32("nan")
        answers = await asyncio.gather(
            *(train(layers, "a", array) for array in (batch(1), bad, batch(2))), return_exceptions=True
        )
        assert [isinstance(answer, errors.NonFinite) for answer in answers] == [False, True, False]
        assert (await layers.get("a")).num_batches_tracked == 2


async def test_batches_that_none_is_refused_of_are_folded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one is slower, and only for finding out which of them is refused."""
    monkeypatch.setattr(plan, "_plan_one_by_one", None)
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        results = await asyncio.gather(*(train(layers, "a", batch(seed), f"{seed}") for seed in range(5)))
        assert sorted(result.num_batches_tracked for result in results) == [1, 2, 3, 4, 5]


async def test_a_bug_in_folding_together_is_no_slow_success(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One by one they would all be folded, and nobody would hear of the bug."""
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        with monkeypatch.context() as patch:
            patch.delattr(plan, "fold_many")
            answers = await asyncio.gather(
                *(train(layers, "a", batch(seed)) for seed in (1, 2)), return_exceptions=True
            )
        assert [type(answer) for answer in answers] == [NameError, NameError]
        assert "a commit of layer 'a' failed" in caplog.text
        assert (await layers.get("a")).num_batches_tracked == 0
        assert (await train(layers, "a", batch(1))).num_batches_tracked == 1


async def test_a_bug_that_one_batch_meets_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fold, fold_many = plan.fold, plan.fold_many

    def strict(state: LayerState, moments: Moments) -> LayerState:
        assert moments.count != 7
        return fold(state, moments)

    def strict_all(state: LayerState, together: list[Moments]) -> LayerState:
        assert all(moments.count != 7 for moments in together)
        return fold_many(state, together)

    monkeypatch.setattr(plan, "fold", strict)
    monkeypatch.setattr(plan, "fold_many", strict_all)
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        answers = await asyncio.gather(
            *(train(layers, "a", batch(1, rows)) for rows in (6, 7, 8)), return_exceptions=True
        )
        assert [isinstance(answer, AssertionError) for answer in answers] == [False, True, False]
        assert (await layers.get("a")).num_batches_tracked == 2


async def test_eval_sees_the_last_fold_and_changes_nothing() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        trained = await train(layers, "a", batch(1))
        before = await layers.get("a")
        result = await evaluate(layers, "a", batch(2))
        module = nn.BatchNorm1d(3)
        module(torch.from_numpy(batch(1)))
        expected = module.eval()(torch.from_numpy(batch(2))).detach().numpy()
        assert np.allclose(result.output.numpy(), expected, rtol=1e-6, atol=1e-6)
        assert (result.version, result.num_batches_tracked) == (trained.version, 1)
        assert await layers.get("a") == before


async def test_queued_batches_of_a_deleted_layer_are_refused() -> None:
    class Slow(MemoryStore):
        async def commit(self, *args, **kwargs):
            await free.wait()
            return await super().commit(*args, **kwargs)

    free = asyncio.Event()
    async with serving(Slow()) as layers:
        await layers.create("a", CONFIG)
        first = asyncio.create_task(train(layers, "a", batch(1)))
        await settle()
        gone = asyncio.create_task(layers.delete("a", None))
        await settle()
        late = asyncio.create_task(train(layers, "a", batch(2)))
        await settle()
        free.set()
        assert (await first).num_batches_tracked == 1
        await gone
        with pytest.raises(errors.LayerNotFound):
            await late


async def test_what_waited_for_a_layer_that_was_replaced_goes_to_the_one_that_has_its_name() -> None:
    """Another process did that; the batch is normalized again, as the new layer does."""
    store = MemoryStore()
    async with serving(store) as layers:
        await layers.create("a", CONFIG)
        await layers.create("b", LayerConfig(num_features=3, eps=0.5))
        await train(layers, "a", batch(1))
        old, other = await store.load("a"), await store.load("b")
        waiting = [asyncio.create_task(train(layers, "a", batch(2)))]
        waiting += [asyncio.create_task(fold_moments(layers, "a", 4, np.zeros(3), np.ones(3)))]
        await store.delete("a", old.stamp)
        await store.create("a", other.data, 10)
        trained, folded = await asyncio.gather(*waiting)
        assert {trained.num_batches_tracked, folded.num_batches_tracked} == {1, 2}
        module = nn.BatchNorm1d(3, eps=0.5)
        assert np.array_equal(trained.output.numpy(), module(torch.from_numpy(batch(2))).detach().numpy())
        assert (await layers.get("a")).samples_tracked == len(batch(2)) + 4


async def test_a_call_behind_a_delete_whose_reply_is_late_finds_the_layer_that_was_created_again() -> None:
    """Found by simulation: it was told 404, after another process had acknowledged the new layer."""

    class LateReply(MemoryStore):
        async def delete(self, *args, **kwargs):
            outcome = await super().delete(*args, **kwargs)
            await reply.wait()
            return outcome

    reply, store = asyncio.Event(), LateReply(exclusive=False)
    async with serving(store) as layers, serving(store) as elsewhere:
        await layers.create("a", CONFIG)
        await train(layers, "a", batch(1))
        gone = asyncio.create_task(layers.delete("a", None))
        await settle()
        await elsewhere.create("a", CONFIG)
        calls = train(layers, "a", batch(2)), layers.reset("a", "parameters", None, None)
        waiting = [asyncio.create_task(call) for call in calls]
        await settle()
        reply.set()
        await gone
        trained, _ = await asyncio.gather(*waiting)
        assert trained.num_batches_tracked == 1


async def test_versions_do_not_repeat_after_delete_and_receipts_go_with_the_layer() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        old = await train(layers, "a", batch(1), "key")
        await layers.delete("a", None)
        made, created = await layers.create("a", CONFIG)
        assert created
        assert made.version > old.version
        again = await train(layers, "a", batch(2), "key")
        assert (again.replayed, again.num_batches_tracked) == (False, 1)


async def test_create_is_idempotent_for_the_config_that_the_layer_was_made_with() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        await layers.update("a", LayerUpdate(eps=0.5), None)
        snapshot, created = await layers.create("a", CONFIG)
        assert (created, snapshot.config.eps) == (False, 0.5)
        with pytest.raises(errors.LayerExists, match=r"created with eps 1e-05, not 0\.5$"):
            await layers.create("a", LayerConfig(num_features=3, eps=0.5))


async def test_a_repeated_reset_resets_once_even_under_the_version_that_it_moved_on_from() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        trained = await train(layers, "a", batch(1))
        expected = frozenset([trained.version])
        first, replayed = await layers.reset("a", "running_stats", "key", expected)
        assert not replayed
        await train(layers, "a", batch(2))
        again, replayed = await layers.reset("a", "running_stats", "key", expected)
        assert (replayed, again.version, again.num_batches_tracked) == (True, first.version, 0)
        assert (await layers.get("a")).num_batches_tracked == 1
        with pytest.raises(errors.VersionMismatch):
            await layers.reset("a", "running_stats", "new key", expected)


async def test_a_stale_version_changes_nothing() -> None:
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", CONFIG)
        await train(layers, "a", batch(1))
        stale = frozenset([made.version])
        before = await layers.get("a")
        for attempt in (
            layers.update("a", LayerUpdate(eps=0.5), stale),
            layers.delete("a", stale),
            layers.replace_state("a", lambda _: {"bias": Tensor.of(np.zeros(3, np.float32))}, stale),
        ):
            with pytest.raises(errors.VersionMismatch):
                await attempt
        assert await layers.get("a") == before


async def test_cold_layers_are_loaded_again_and_names_without_a_layer_take_no_room() -> None:
    async with serving(MemoryStore(), resident_layers=2) as layers:
        for index in range(5):
            await layers.create(f"layer{index}", CONFIG)
            await train(layers, f"layer{index}", batch(index))
        for index in range(5):
            assert (await train(layers, f"layer{index}", batch(index))).num_batches_tracked == 2
            assert len(layers._cache) <= 2
        for index in range(20):
            with pytest.raises(errors.LayerNotFound):
                await layers.get(f"nothing{index}")
        assert len(layers._cache) <= 2
        assert not any(f"nothing{index}" in layers._cache for index in range(20))


async def test_a_full_queue_is_refused_as_overload() -> None:
    async with serving(MemoryStore(), queue_length=3) as layers:
        await layers.create("a", CONFIG)
        answers = await asyncio.gather(*(train(layers, "a", batch(i)) for i in range(10)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, errors.Overloaded)]
        assert refused
        assert refused[0].retry_after
        assert (await layers.get("a")).num_batches_tracked == 10 - len(refused) >= 3


async def test_large_batches_go_to_a_thread_and_give_the_same() -> None:
    async with serving(MemoryStore(), inline_bytes=0) as threaded, serving(MemoryStore()) as inline:
        for layers in (threaded, inline):
            await layers.create("a", CONFIG)
        results = [await train(layers, "a", batch(1, rows=1000)) for layers in (threaded, inline)]
        assert bytes(results[0].output.buffer) == bytes(results[1].output.buffer)


async def test_too_many_layers() -> None:
    async with serving(MemoryStore(), max_layers=2) as layers:
        await layers.create("a", CONFIG)
        await layers.create("b", CONFIG)
        await layers.create("b", CONFIG)
        with pytest.raises(errors.TooManyLayers):
            await layers.create("c", CONFIG)
        await layers.delete("a", None)
        await layers.create("c", CONFIG)


async def test_listing_pages_through_names() -> None:
    async with serving(MemoryStore()) as layers:
        for name in ("a.1", "a.2", "a.3", "b"):
            await layers.create(name, CONFIG)
        await train(layers, "a.2", batch(1))
        page = await layers.list("a.", "", 2)
        assert [(one.name, one.num_batches_tracked) for one in page.layers] == [("a.1", 0), ("a.2", 1)]
        assert page.next == "a.2"
        rest = await layers.list("a.", page.next, 2)
        assert ([one.name for one in rest.layers], rest.next) == (["a.3"], None)


async def test_a_missing_or_wrong_tensor_is_refused_by_name() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        with pytest.raises(errors.InvalidRequest) as refused:
            await layers.batches.train("a", lambda _: {}, None)
        assert refused.value.fields["field"] == "input"
        with pytest.raises(errors.DeviceUnavailable):
            await layers.create("b", LayerConfig(num_features=3, device="cuda:99"))


async def test_receipts_are_small() -> None:
    """The design promises under 100 bytes a receipt, whatever the length of the caller's key."""
    seen: list[Receipt] = []

    class Watching(MemoryStore):
        async def commit(self, name, expected, record, receipts, keep=0):
            seen.extend(receipts)
            return await super().commit(name, expected, record, receipts, keep)

    async with serving(Watching()) as layers:
        await layers.create("a", CONFIG)
        await train(layers, "a", batch(1), "k" * 200)
    assert [(len(receipt.key), len(receipt.fingerprint)) for receipt in seen] == [(16, 16)]
    assert Duplicates(tuple(seen)).receipts[0].batch == 1


@pytest.mark.parametrize("change", ["policy", "statistics", "weight"])
async def test_a_repeat_is_answered_also_when_the_layer_would_refuse_the_batch_by_now(change: str) -> None:
    """It was acknowledged and is counted: telling its sender that it changed nothing would be a lie."""
    array = batch(1)
    config = LayerConfig(num_features=3, non_finite="allow" if change == "policy" else "reject")
    if change == "policy":
        array[0, 0] = np.nan
    async with serving(MemoryStore()) as layers:
        await layers.create("a", config)
        first = await train(layers, "a", array, "key")
        if change == "policy":
            await layers.update("a", LayerUpdate(non_finite="reject"), None)
        elif change == "weight":
            await layers.update("a", LayerUpdate(weight=[3e38] * 3, bias=[3e38] * 3), None)
        else:
            broken = {"running_mean": Tensor.of(np.full(3, np.nan, np.float32))}
            await layers.replace_state("a", lambda _: broken, None)
        again = await train(layers, "a", array, "key")
        assert (again.replayed, again.version, again.num_batches_tracked) == (True, first.version, 1)
        if change != "weight":
            assert np.array_equal(again.output.numpy(), first.output.numpy(), equal_nan=True)
        with pytest.raises(errors.NonFinite):
            await train(layers, "a", array, "another key")


async def test_counters_that_would_overflow_are_refused_and_the_neighbours_are_folded() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", LayerConfig(num_features=3, statistics="population"))

        async def fold(count: int) -> object:
            return await fold_moments(layers, "a", count, np.zeros(3), np.ones(3))

        answers = await asyncio.gather(*(fold(count) for count in (5, 2**63 - 1, 5)), return_exceptions=True)
        assert isinstance(answers[1], errors.InvalidRequest)
        assert answers[1].fields["field"] == "samples_tracked"
        assert (await layers.get("a")).samples_tracked == 10
        most = {"num_batches_tracked": Tensor.of(np.array(2**63 - 1, np.int64))}
        await layers.replace_state("a", lambda _: most, None)
        with pytest.raises(errors.InvalidRequest) as refused:
            await fold(5)
        assert refused.value.fields["field"] == "num_batches_tracked"

"""Synchronized batches: shards of any size are normalized as one batch, folded once, and answered again on a retry."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.tensors import to_wire
from batchnorm_service.layers import GroupCall, Layers
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import CONFIG, batch, serving, settle, train

pytestmark = pytest.mark.anyio

PAIR = GroupCall("pair", 2)


async def _fold(layers: Layers, array: np.ndarray, key: str | None = None, **options: Any) -> Any:
    wide = array.astype(np.float64) if len(array) else np.zeros((1, 3))
    tensors = _tensors(len(array), wide.mean(0), wide.var(0))
    return await layers.batches.fold_moments("a", lambda _: tensors, key, **options)


def _tensors(count: int, mean: np.ndarray, var: np.ndarray) -> dict[str, Tensor]:
    return {"count": Tensor.of(np.array(count, np.int64)), "mean": Tensor.of(mean), "var": Tensor.of(var)}


async def _backward(layers: Layers, x: np.ndarray, grad: np.ndarray, key: str | None = None, **options: Any) -> Any:
    tensors = {"input": Tensor.of(x), "grad_output": Tensor.of(grad)}
    return await layers.batches.backward("a", lambda _: tensors, key, training=True, **options)


@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [1, 1], [3, 0, 5], [2, 3, 4, 5]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
async def test_shards_are_normalized_and_folded_as_one_batch(sizes: list[int], dtype: str) -> None:
    whole = np.concatenate([batch(seed, rows=size) for seed, size in enumerate(sizes)]).astype(dtype)
    shards = np.split(whole, np.cumsum(sizes)[:-1])
    async with serving(MemoryStore()) as layers:
        await layers.create("a", LayerConfig(num_features=3, dtype=dtype))
        group = GroupCall("g", len(sizes))
        results = await asyncio.gather(
            *(train(layers, "a", shard, f"member{i}", group=group, statistics=True) for i, shard in enumerate(shards))
        )
        module = nn.BatchNorm1d(3, dtype=getattr(torch, dtype))
        expected = module(torch.from_numpy(whole)).detach().numpy()
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        assert np.allclose(np.concatenate([one.output.numpy() for one in results]), expected, tolerance, tolerance)
        assert {one.num_batches_tracked for one in results} == {1}
        assert {one.version for one in results} == {2}
        layer = await layers.get("a")
        assert layer.samples_tracked == len(whole)
        assert np.allclose(layer.tensors["running_mean"].numpy(), module.running_mean.numpy(), tolerance, tolerance)
        assert np.allclose(layer.tensors["running_var"].numpy(), module.running_var.numpy(), tolerance, tolerance)


async def test_moments_and_batches_may_be_members_of_one_group() -> None:
    whole = batch(1, rows=9)
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        group = GroupCall("g", 2)
        trained, folded = await asyncio.gather(
            train(layers, "a", whole[:4], group=group), _fold(layers, whole[4:], group=group)
        )
        assert trained.num_batches_tracked == folded.num_batches_tracked == 1
        assert folded.count == 9
        assert np.allclose(folded.moments["mean"].numpy(), whole.astype(float).mean(0), rtol=1e-12)
        assert np.allclose(folded.moments["var"].numpy(), whole.astype(float).var(0), rtol=1e-12)


async def test_a_retry_gets_its_answer_again_also_after_a_restart() -> None:
    store = MemoryStore()
    arrays = [batch(1), batch(2, rows=5)]
    group = GroupCall("g", 2)
    async with serving(store) as layers:
        await layers.create("a", CONFIG)
        first = await asyncio.gather(*(train(layers, "a", x, f"key{i}", group=group) for i, x in enumerate(arrays)))
    async with serving(store) as layers:
        again = await train(layers, "a", arrays[1], "key1", group=group)
        assert again.replayed
        assert (again.version, again.num_batches_tracked) == (first[1].version, 1)
        assert bytes(again.output.buffer) == bytes(first[1].output.buffer)
        assert (await layers.get("a")).num_batches_tracked == 1
        with pytest.raises(errors.IdempotencyKeyReused):
            await train(layers, "a", arrays[0], "key1", group=group)
        with pytest.raises(errors.GroupClosed):
            await train(layers, "a", arrays[0], "late", group=group)
        with pytest.raises(errors.GroupMismatch) as refused:
            await train(layers, "a", arrays[1], "key1", group=GroupCall("g", 3))
        assert refused.value.fields["expected"] == 2


async def test_a_member_that_never_comes_leaves_nothing_folded_and_the_id_taken() -> None:
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", CONFIG)
        group = GroupCall("g", 3, timeout=0.05)
        answers = await asyncio.gather(
            *(train(layers, "a", batch(seed), f"key{seed}", group=group) for seed in range(2)), return_exceptions=True
        )
        assert all(isinstance(answer, errors.GroupIncomplete) for answer in answers)
        assert answers[0].fields["got"] == 2
        layer = await layers.get("a")
        assert (layer.version, layer.num_batches_tracked) == (made.version, 0)
        with pytest.raises(errors.GroupClosed):
            await train(layers, "a", batch(2), "key2", group=group)
        with pytest.raises(errors.GroupIncomplete):
            await train(layers, "a", batch(0), "key0", group=group)


async def test_one_too_many_and_another_size_are_refused() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        group = GroupCall("g", 2)
        first = asyncio.create_task(train(layers, "a", batch(1), "one", group=group))
        await settle()
        with pytest.raises(errors.GroupMismatch):
            await train(layers, "a", batch(2), "two", group=GroupCall("g", 5))
        with pytest.raises(errors.IdempotencyKeyReused):
            await train(layers, "a", batch(2), "one", group=group)
        twin = asyncio.create_task(train(layers, "a", batch(1), "one", group=group))
        await settle()
        answers = await asyncio.gather(
            *(train(layers, "a", batch(seed), f"k{seed}", group=group) for seed in (2, 3)), return_exceptions=True
        )
        assert sorted(isinstance(answer, errors.GroupClosed) for answer in answers) == [False, True]
        assert (await first).num_batches_tracked == 1
        assert (await twin).replayed
        assert bytes((await twin).output.buffer) == bytes((await first).output.buffer)


async def test_a_member_without_a_key_is_withdrawn_when_its_caller_hangs_up() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        group = GroupCall("g", 2)
        gone = asyncio.create_task(train(layers, "a", batch(1), group=group))
        await settle()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        results = await asyncio.gather(*(train(layers, "a", batch(seed), group=group) for seed in (2, 3)))
        module = nn.BatchNorm1d(3)
        module(torch.from_numpy(np.concatenate([batch(2), batch(3)])))
        assert results[0].num_batches_tracked == 1
        layer = await layers.get("a")
        assert np.allclose(layer.tensors["running_mean"].numpy(), module.running_mean.numpy(), rtol=1e-6)


async def test_too_few_values_counts_the_whole_group() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        answers = await asyncio.gather(
            *(train(layers, "a", batch(1, rows=rows), group=GroupCall("g", 2)) for rows in (1, 0)),
            return_exceptions=True,
        )
        assert all(isinstance(answer, errors.TooFewValues) for answer in answers)
        assert (await layers.get("a")).num_batches_tracked == 0


async def test_one_bad_shard_refuses_the_whole_and_changes_nothing() -> None:
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", CONFIG)
        arrays = [batch(1), batch(2) * np.float32("nan")]
        answers = await asyncio.gather(
            *(train(layers, "a", x, f"k{i}", group=GroupCall("g", 2)) for i, x in enumerate(arrays)),
            return_exceptions=True,
        )
        assert all(isinstance(answer, errors.NonFinite) for answer in answers)
        assert (await layers.get("a")).version == made.version


@pytest.mark.parametrize("clip", [70000.0, 3.5e38, 1e308])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
async def test_a_clip_that_the_dtype_does_not_have_is_its_largest_number(dtype: str, clip: float) -> None:
    """Once a group is folded nothing may fail: its members would be told so for ever."""
    wide = "float64" if dtype == "float64" else "float32"
    shards = [torch.from_numpy(batch(seed)).to(getattr(torch, dtype)) for seed in (1, 2)]

    def reads(shard: torch.Tensor) -> Any:
        return lambda _: {"input": to_wire(shard)}

    async with serving(MemoryStore()) as layers:
        for name, bound in (("clipped", clip), ("plain", None)):
            await layers.create(name, LayerConfig(num_features=3, dtype=wide, clip=bound))

        async def outputs(name: str) -> list[bytes]:
            together = [layers.batches.train(name, reads(x), f"k{i}", group=PAIR) for i, x in enumerate(shards)]
            results = await asyncio.gather(*together)
            assert {one.num_batches_tracked for one in results} == {1}
            alone = await layers.batches.train(name, reads(shards[0]), None)
            normal = await layers.batches.eval(name, reads(shards[0]))
            again = await layers.batches.train(name, reads(shards[1]), "k1", group=PAIR)
            assert again.replayed
            return [bytes(one.output.buffer) for one in (*results, alone, normal, again)]

        assert await outputs("clipped") == await outputs("plain")


async def test_an_output_that_roundings_make_infinite_is_refused_before_the_fold() -> None:
    """60000 over sqrt(1e-16): the kernel multiplies up to 6e12, and rounds that by more than 65504."""
    constant = np.full((20, 3), 60000, np.float16)
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", LayerConfig(num_features=3, eps=1e-16))
        for call in (
            [train(layers, "a", constant)],
            [train(layers, "a", constant, f"k{i}", group=PAIR) for i in range(2)],
        ):
            answers = await asyncio.gather(*call, return_exceptions=True)
            assert all(isinstance(answer, errors.NonFinite) for answer in answers)
        assert (await layers.get("a")).version == made.version


@pytest.mark.parametrize("counts", [[2**63 - 1] * 2, [2**63 - 1] * 3, [2**62, 2**62, 0], [1, 2**63 - 1]], ids=str)
@pytest.mark.parametrize("config", [{}, {"non_finite": "allow"}, {"statistics": "population"}], ids=str)
async def test_counts_that_are_too_large_together_are_refused_to_every_member(counts: list[int], config: dict) -> None:
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", LayerConfig(num_features=3, **config))

        async def post(member: int) -> Any:
            tensors = _tensors(counts[member], np.zeros(3), np.ones(3))
            return await layers.batches.fold_moments("a", lambda _: tensors, f"k{member}", group=group)

        group = GroupCall("g", len(counts))
        for _ in range(2):  # and again, when they come back
            answers = await asyncio.gather(*(post(i) for i in range(len(counts))), return_exceptions=True)
            assert [type(answer) for answer in answers] == [errors.InvalidRequest] * len(counts)
            assert {answer.fields["field"] for answer in answers} == {"count"}
        assert (await layers.get("a")).version == made.version
        assert (await train(layers, "a", batch(1))).num_batches_tracked == 1


async def test_a_group_that_the_counter_of_samples_has_no_room_for_is_refused_to_every_member() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)

        async def post(name: str, count: int, group: GroupCall | None = None) -> Any:
            tensors = _tensors(count, np.zeros(3), np.ones(3))
            return await layers.batches.fold_moments("a", lambda _: tensors, name, group=group)

        assert (await post("alone", 2**63 - 1)).num_batches_tracked == 1
        with pytest.raises(errors.InvalidRequest):
            await post("again", 2)
        for size in ([2, 2], [2**62, 2**61]):
            group = GroupCall(f"g{size}", 2)
            together = (post(f"{group.id}-{i}", count, group) for i, count in enumerate(size))
            answers = await asyncio.gather(*together, return_exceptions=True)
            assert [answer.fields["field"] for answer in answers] == ["samples_tracked"] * 2
        assert (await layers.get("a")).samples_tracked == 2**63 - 1


async def test_shards_of_a_deleted_layer_do_not_get_into_the_one_that_follows_it() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        group = GroupCall("g", 2, timeout=0.1)
        first = asyncio.create_task(train(layers, "a", batch(1), "one", group=group))
        await settle()
        await layers.delete("a", None)
        await layers.create("a", CONFIG)
        answers = await asyncio.gather(first, train(layers, "a", batch(2), "two", group=group), return_exceptions=True)
        assert [type(answer) for answer in answers] == [errors.LayerNotFound, errors.GroupIncomplete]
        assert (await layers.get("a")).num_batches_tracked == 0


async def test_a_group_is_normalized_with_the_weight_that_it_was_committed_on() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        group = GroupCall("g", 2)
        first = asyncio.create_task(train(layers, "a", batch(1), group=group))
        await settle()
        await layers.update("a", LayerUpdate(weight=[2.0, 2.0, 2.0]), None)
        second = await train(layers, "a", batch(2), group=group)
        module = nn.BatchNorm1d(3)
        expected = 2 * module(torch.from_numpy(np.concatenate([batch(1), batch(2)]))).detach().numpy()
        got = np.concatenate([(await first).output.numpy(), second.output.numpy()])
        assert np.allclose(got, expected, rtol=1e-5, atol=1e-5)


async def test_gradients_of_shards_are_those_of_the_whole_batch_and_come_again() -> None:
    x, grad = batch(1, rows=9).astype(np.float64), batch(2, rows=9).astype(np.float64)
    async with serving(MemoryStore()) as layers:
        made, _ = await layers.create("a", LayerConfig(num_features=3, dtype="float64"))
        whole = await _backward(layers, x, grad)
        group = GroupCall("g", 2)
        parts = await asyncio.gather(
            _backward(layers, x[:2], grad[:2], "one", group=group),
            _backward(layers, x[2:], grad[2:], "two", group=group),
        )
        joined = np.concatenate([part.gradients["grad_input"].numpy() for part in parts])
        assert np.allclose(joined, whole.gradients["grad_input"].numpy(), rtol=1e-9, atol=1e-12)
        summed = sum(part.gradients["grad_weight"].numpy() for part in parts)
        assert np.allclose(summed, whole.gradients["grad_weight"].numpy(), rtol=1e-9)
        again = await _backward(layers, x[2:], grad[2:], "two", group=group)
        assert again.replayed
        assert bytes(again.gradients["grad_input"].buffer) == bytes(parts[1].gradients["grad_input"].buffer)
        assert (await layers.get("a")).version == made.version


async def test_a_backward_group_refuses_what_it_cannot_do() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", LayerConfig(num_features=3, clip=5.0))
        with pytest.raises(errors.InvalidRequest):
            await _backward(layers, batch(1), batch(2), group=GroupCall("g", 2))


async def test_posted_moments_equal_the_batch_that_stayed_away() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        module = nn.BatchNorm1d(3)
        for seed in range(5):
            module(torch.from_numpy(batch(seed)))
            folded = await _fold(layers, batch(seed), f"key{seed}")
            assert (folded.num_batches_tracked, folded.replayed) == (seed + 1, False)
            assert (await _fold(layers, batch(seed), f"key{seed}")).replayed
        layer = await layers.get("a")
        assert np.allclose(layer.tensors["running_mean"].numpy(), module.running_mean.numpy(), rtol=1e-6)
        assert np.allclose(layer.tensors["running_var"].numpy(), module.running_var.numpy(), rtol=1e-6)
        assert layer.samples_tracked == 40


async def test_many_layers_at_once_each_all_or_nothing() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        await layers.create("b", LayerConfig(num_features=2))
        moments = _tensors(4, np.zeros(3), np.ones(3))
        answers = await layers.batches.fold_many(dict.fromkeys(["a", "b", "c"], moments), "key")
        assert answers["a"].num_batches_tracked == 1
        assert isinstance(answers["b"], errors.ShapeMismatch)
        assert isinstance(answers["c"], errors.LayerNotFound)
        again = await layers.batches.fold_many(dict.fromkeys(["a", "b", "c"], moments), "key")
        assert again["a"].replayed
        assert (await layers.get("a")).num_batches_tracked == 1


async def test_inverse_undoes_eval() -> None:
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        await train(layers, "a", batch(1))
        normal = await layers.batches.eval("a", lambda _: {"input": Tensor.of(batch(2))})
        back = await layers.batches.inverse("a", lambda _: {"input": normal.output})
        assert np.allclose(back.output.numpy(), batch(2), rtol=1e-5, atol=1e-5)


async def test_waiting_for_the_others_commits_nothing() -> None:
    """Each look for the receipt of a group was a commit that was meant to fail."""

    class Counting(MemoryStore):
        commits = looks = 0
        looked = asyncio.Event()

        async def commit(self, *args: Any) -> Any:
            self.commits += 1
            return await super().commit(*args)

        async def join(self, *args: Any) -> Any:
            self.looks += 1
            if self.looks == 5:
                self.looked.set()
            return await super().join(*args)

    store = Counting()
    async with serving(store) as layers:
        await layers.create("a", CONFIG)
        first = asyncio.create_task(train(layers, "a", batch(1), "one", group=GroupCall("g", 2)))
        await store.looked.wait()
        assert store.commits == 0
        await asyncio.gather(first, train(layers, "a", batch(2), "two", group=GroupCall("g", 2)))
        assert store.commits == 1


async def test_a_repeat_for_a_layer_that_was_replaced_is_judged_by_the_new_one() -> None:
    """Between two looks at the store, the layer that a refused repeat was meant for is deleted and made again."""

    class Replacing(MemoryStore):
        replace = False

        async def find_receipts(self, *args: Any) -> Any:
            if self.replace:
                self.replace = False
                record = await self.load("a")
                await self.delete("a", record.stamp)
                await self.create("a", record.data, 10)
            return await super().find_receipts(*args)

    store = Replacing(exclusive=False)
    async with serving(store) as layers:
        await layers.create("a", CONFIG)
        poisoned = batch(1)
        poisoned[0, 0] = np.nan
        for call in (
            lambda: train(layers, "a", poisoned, "key"),
            lambda: layers.reset("a", "all", "key", frozenset([99])),
        ):
            store.replace = True
            with pytest.raises((errors.NonFinite, errors.VersionMismatch)):
                await call()
            assert not store.replace
        assert (await train(layers, "a", batch(2), "key")).num_batches_tracked == 1


SOLO = GroupCall("solo", 1)


@pytest.mark.parametrize("first", [None, SOLO, GroupCall("other", 1)], ids=["alone", "group", "other group"])
@pytest.mark.parametrize("second", [None, SOLO, GroupCall("other", 1)], ids=["alone", "group", "other group"])
async def test_a_key_stands_for_one_batch_and_one_group(first: GroupCall | None, second: GroupCall | None) -> None:
    """The same batch under the same key was folded again when it came alone and in a group."""
    x = batch(1)
    async with serving(MemoryStore()) as layers:
        await layers.create("a", CONFIG)
        done = await train(layers, "a", x, "key", group=first)
        if first == second:
            again = await train(layers, "a", x, "key", group=second)
            assert again.replayed
            assert again.version == done.version
        else:
            with pytest.raises(errors.IdempotencyKeyReused):
                await train(layers, "a", x, "key", group=second)
        with pytest.raises(errors.IdempotencyKeyReused):
            await layers.reset("a", "all", "key", None)
        assert (await layers.get("a")).num_batches_tracked == 1


class Joined(MemoryStore):
    """Tells when a shard has come."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = asyncio.Event()

    async def join(self, *arguments: Any) -> Any:
        found = await super().join(*arguments)
        self.joined.set()
        return found


async def test_a_key_that_is_used_while_its_group_waits_does_not_hold_the_group_up() -> None:
    store = Joined()
    async with serving(store) as layers:
        await layers.create("a", CONFIG)
        waiting = asyncio.ensure_future(train(layers, "a", batch(1), "key", group=PAIR))
        await store.joined.wait()
        await train(layers, "a", batch(3), "key")
        answers = await asyncio.gather(train(layers, "a", batch(2), "b", group=PAIR), waiting)
        assert {each.num_batches_tracked for each in answers} == {2}  # its shard had come before

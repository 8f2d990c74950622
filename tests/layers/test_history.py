"""Kept states and pins without HTTP: lost replies, the clock, the cache, several processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import DigestMismatch, LayerPinned, PinExists, StoreUnavailable, VersionNotFound
from batchnorm_client.wire.tensors import Tensor, decode_safetensors, encode_safetensors
from batchnorm_service.layers import Layers, LayersOptions, Normalized, kept_states
from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import Record, Store, StoreError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.store import SqliteStore

from .conftest import batch, train

pytestmark = pytest.mark.anyio

KEEP_ALL = LayersOptions(history_seconds=0)


class Clock(Runtime):
    """A wall clock that a test sets."""

    seconds = 1e9

    @staticmethod
    def wall() -> float:
        return Clock.seconds


async def layer(store: Store | None = None, options: LayersOptions = KEEP_ALL, **more: Any) -> Layers:
    store = store or MemoryStore()
    await store.open()
    layers = Layers(store, options, **more)
    await layers.create("a", LayerConfig(num_features=3))
    return layers


async def eval_at(layers: Layers, at: int | str | None = None, expect: str | None = None) -> Normalized:
    return await layers.batches.eval("a", lambda _: {"input": Tensor.of(batch(0))}, at=at, expect=expect)


async def versions(layers: Layers) -> list[int]:
    return [entry.version for entry in (await layers.history.list("a", 1000, None)).history]


async def test_a_minute_between_two_kept_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "seconds", 1e9)
    layers = await layer(options=LayersOptions(history_seconds=60), runtime=Clock())
    kept: list[int] = []
    for second in range(200):
        monkeypatch.setattr(Clock, "seconds", 1e9 + second)
        if second in (60, 120, 180):
            kept.append((await layers.get("a")).version)
        await train(layers, "a", batch(second))
    assert await versions(layers) == [(await layers.get("a")).version, *reversed(kept)]


async def test_a_clock_that_is_set_back_does_not_stop_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "seconds", 1e9)
    layers = await layer(options=LayersOptions(history_seconds=60), runtime=Clock())
    monkeypatch.setattr(Clock, "seconds", 1e9 - 1e6)
    await train(layers, "a", batch(1))
    assert len(await versions(layers)) == 2


async def test_a_group_commit_keeps_one_state() -> None:
    layers = await layer()
    await asyncio.gather(*(train(layers, "a", batch(seed)) for seed in range(20)))
    newest = await layers.get("a")
    assert newest.num_batches_tracked == 20
    assert len(await versions(layers)) == newest.version - 1 + 1, "as many as commits, not as many as batches"


async def test_a_pin_that_is_made_while_batches_come() -> None:
    """The state that is pinned may be replaced between its reading and the pin."""

    class Racing(MemoryStore):
        layers: Layers
        races = 3

        async def pin(self, *args: Any) -> Any:
            if self.races:
                self.races -= 1
                await train(self.layers, "a", batch(self.races))
            return await super().pin(*args)

    store = Racing()
    store.layers = layers = await layer(store, LayersOptions(history_length=0))
    pin, created = await layers.history.pin("a", "best", None, None)
    assert created
    assert (pin.version, pin.digest) == ((await layers.get("a")).version, (await layers.get("a")).digest)


@pytest.mark.parametrize("version", [None, 2])
async def test_a_pin_that_is_deleted_as_soon_as_it_is_made(version: int | None) -> None:
    """Seen: 404, though the call had taken effect."""

    class Deleting(MemoryStore):
        async def pin(self, *args: Any) -> Any:
            made = await super().pin(*args)
            await self.unpin("a", made.pinned.stamp.incarnation, "best", 0)
            return made

    layers = await layer(Deleting())
    await train(layers, "a", batch(1))
    digest = (await layers.get("a")).digest
    if version:
        await train(layers, "a", batch(2))
    pin, created = await layers.history.pin("a", "best", version, None)
    assert (pin.version, pin.digest, created) == (2, digest, True)
    assert (await layers.history.pins("a")).pins == []


async def test_a_tag_that_is_deleted_before_the_repeat_is_answered_is_made_again() -> None:
    class Deleting(MemoryStore):
        deletes = False

        async def kept(self, name: str) -> Any:
            if self.deletes:
                self.deletes = False
                pinned = await self.load_kept(name, "best")
                assert isinstance(pinned, Record)
                await self.unpin(name, pinned.stamp.incarnation, "best", 0)
            return await super().kept(name)

    store = Deleting()
    layers = await layer(store, LayersOptions(history_length=0))
    pin, _ = await layers.history.pin("a", "best", None, "key")
    store.deletes = True
    again, created = await layers.history.pin("a", "best", None, "key")
    assert created
    assert (again.version, again.digest) == (pin.version, pin.digest)
    assert [each.tag for each in (await layers.history.pins("a")).pins] == ["best"]


async def test_a_tag_that_is_moved_while_it_is_read_has_the_digest_of_its_version() -> None:
    """Seen: the digest of another state beside the version."""

    class Moving(MemoryStore):
        async def kept(self, name: str) -> Any:
            found = await super().kept(name)
            if moves:
                newest = await self.load(name)
                assert isinstance(newest, Record)
                await self.unpin(name, newest.stamp.incarnation, "best", 100)
                await self.pin(name, newest.stamp, "best", moves.pop(), 100)
            return found

    moves: list[bytes] = []
    layers = await layer(Moving())
    pin, _ = await layers.history.pin("a", "best", None, None)
    await train(layers, "a", batch(1))
    moves.append(b'{"at": "2020-01-01T00:00:00+00:00"}')
    assert (await layers.history.get_pin("a", "best")) == pin
    moved = await layers.history.get_pin("a", "best")
    assert (moved.version, moved.digest) == (2, (await layers.get("a")).digest)


async def test_each_state_is_loaded_and_digested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 120 states of a million channels, each listing took 5 s."""

    class Counting(MemoryStore):
        loaded = 0

        async def load_kept(self, *args: Any) -> Any:
            self.loaded += 1
            return await super().load_kept(*args)

    store = Counting()
    layers = await layer(store)
    for seed in range(12):
        await train(layers, "a", batch(seed))
        await layers.history.pin("a", f"t{seed}", None, None)
    first = await layers.history.list("a", 100, None), await layers.history.pins("a")
    assert store.loaded == 12
    for _ in range(3):
        assert (await layers.history.list("a", 100, None), await layers.history.pins("a")) == first
    assert store.loaded == 12
    await train(layers, "a", batch(99))
    assert len((await layers.history.list("a", 100, None)).history) == 14
    assert store.loaded == 12, "the newest is in memory, and the one before was when it was listed"
    monkeypatch.setattr("batchnorm_service.layers.history._DESCRIBED", 3)
    assert (await layers.history.list("a", 100, None)).history[1:] == first[0].history
    assert len(layers.history._described) <= 14
    await layers.delete("a", None, with_pins=True)
    await layers.create("a", LayerConfig(num_features=3))
    assert [entry.operation for entry in (await layers.history.list("a", 100, None)).history] == ["create"]
    assert len(layers.history._described) == 3


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_a_pin_whose_reply_is_lost_is_made_once(lost: str) -> None:
    class Losing(MemoryStore):
        losses = 2

        async def _lose(self, method: Any, *args: Any) -> Any:
            if self.losses and lost == "before":
                self.losses -= 1
                raise StoreError("lost")
            done = await method(*args)
            if self.losses:
                self.losses -= 1
                raise StoreError("lost")
            return done

        async def pin(self, *args: Any) -> Any:
            return await self._lose(super().pin, *args)

        async def unpin(self, *args: Any) -> Any:
            return await self._lose(super().unpin, *args)

    store = Losing()
    layers = await layer(store)
    pin, created = await layers.history.pin("a", "best", None, None)
    assert created
    assert await layers.history.pin("a", "best", None, None) == (pin, False)
    store.losses = 2
    await layers.history.unpin("a", "best")
    assert (await layers.history.pins("a")).pins == []


async def test_a_store_that_is_away_is_told() -> None:
    class Away(MemoryStore):
        async def pin(self, *args: Any) -> Any:
            raise StoreError("away")

        async def load_kept(self, *args: Any) -> Any:
            raise StoreError("away")

    layers = await layer(Away(), LayersOptions(store_timeout=0.05))
    with pytest.raises(StoreUnavailable):
        await layers.history.pin("a", "best", None, None)
    with pytest.raises(StoreUnavailable):
        await eval_at(layers, "best")


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_tag_that_is_moved(exclusive: bool) -> None:
    """Another state under the same tag is seen at once, also by another process where the store is shared."""
    store = MemoryStore(exclusive=exclusive)
    writer = await layer(store)
    reader = writer if exclusive else Layers(store, KEEP_ALL)
    for seed in range(3):
        await train(writer, "a", batch(seed))
        newest = await eval_at(writer)
        await writer.history.pin("a", "best", None, None)
        for _ in range(2):
            found = await eval_at(reader, "best")
            assert (found.version, found.digest) == (newest.version, newest.digest)
            assert bytes(found.output.buffer) == bytes(newest.output.buffer)
        await train(writer, "a", batch(seed))
        with pytest.raises(PinExists):
            await writer.history.pin("a", "best", None, None)
        await writer.history.unpin("a", "best")
        with pytest.raises(VersionNotFound):
            await eval_at(reader, "best")


async def test_a_tag_of_a_layer_that_was_deleted() -> None:
    layers = await layer()
    await layers.history.pin("a", "best", None, None)
    await eval_at(layers, "best")
    with layers._cache.use("a"):  # a call that goes on meanwhile keeps the entry, and what it has in memory
        with pytest.raises(LayerPinned):
            await layers.delete("a", None)
        await layers.delete("a", None, with_pins=True)
        await layers.create("a", LayerConfig(num_features=3))
        with pytest.raises(VersionNotFound):
            await eval_at(layers, "best")


@pytest.mark.parametrize("call", ["unpin", "delete"])
async def test_a_tag_that_may_be_gone_is_looked_up_again(call: str) -> None:
    """After a call whose outcome nobody knows, not even the only user of a store knows what a tag stands for."""

    class Silent(MemoryStore):
        silent = False

        async def unpin(self, *args: Any) -> Any:
            return await self._lose(await super().unpin(*args))

        async def delete(self, *args: Any, **options: Any) -> Any:
            return await self._lose(await super().delete(*args, **options))

        async def _lose(self, done: Any) -> Any:
            if self.silent:
                raise StoreError("lost")
            return done

    store = Silent()
    layers = await layer(store, LayersOptions(store_timeout=0.05))
    await layers.history.pin("a", "best", None, None)
    with layers._cache.use("a"):
        await eval_at(layers, "best")  # now it is in memory
        store.silent = True
        with pytest.raises(StoreUnavailable):
            await (layers.history.unpin("a", "best") if call == "unpin" else layers.delete("a", None, with_pins=True))
        store.silent = False
        if call == "delete":
            await layers.create("a", LayerConfig(num_features=3))
        with pytest.raises(VersionNotFound):
            await eval_at(layers, "best")
        with pytest.raises(VersionNotFound):
            async with asyncio.timeout(30):  # it went on for ever
                await layers.rollback("a", "best", None, None)


@pytest.mark.parametrize(("size", "loads"), [(1, 4), (1 << 20, 2)])
async def test_large_states_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch, size: int, loads: int) -> None:
    """Two tags are read in turns, each twice: with room for one state, it is loaded at each turn."""

    class Counting(MemoryStore):
        loaded = 0

        async def load_kept(self, *args: Any) -> Any:
            self.loaded += 1
            return await super().load_kept(*args)

    monkeypatch.setattr(kept_states, "_CACHED_BYTES", size)
    store = Counting()
    layers = await layer(store)
    for tag in "ab":
        await layers.history.pin("a", tag, None, None)
    layers = Layers(store, KEEP_ALL)
    store.loaded = 0
    with layers._cache.use("a"):
        for tag in "aabbaabb":
            await eval_at(layers, tag)
    assert store.loaded == loads


@pytest.mark.parametrize("at", [2**63 - 1, 2**63, 10**19 - 1])
async def test_a_version_of_more_than_64_bits(tmp_path: Path, at: int) -> None:
    store = SqliteStore(tmp_path / "layers.db")
    try:
        layers = await layer(store)
        with pytest.raises(VersionNotFound) as refused:
            await eval_at(layers, at)
        assert refused.value.fields["got"] == at
    finally:
        await store.close()


async def test_the_newest_version_is_not_taken_for_a_kept_one() -> None:
    layers = await layer(options=LayersOptions(history_length=0))
    version = (await train(layers, "a", batch(1))).version
    assert (await eval_at(layers, version)).version == version
    await train(layers, "a", batch(2))
    with pytest.raises(VersionNotFound):
        await eval_at(layers, version)


async def test_a_thousand_pairs_of_checkpoint_and_layer() -> None:
    """No wrong pair of pin and digest is served."""
    layers = await layer()
    digests: list[str] = []
    for seed in range(32):
        await train(layers, "a", batch(seed))
        digests.append((await layers.history.pin("a", f"ckpt-{seed}", None, None))[0].digest)
    assert len(set(digests)) == 32
    for seed, digest in enumerate(digests):
        for expected in digests:
            if expected == digest:
                assert (await eval_at(layers, f"ckpt-{seed}", expected)).digest == expected
            else:
                with pytest.raises(DigestMismatch):
                    await eval_at(layers, f"ckpt-{seed}", expected)


async def test_records_of_an_older_release_have_a_history_too() -> None:
    """Their metadata has neither the operation nor when a state was last kept."""
    store = MemoryStore()
    await layer(store)
    found = await store.load("a")
    assert isinstance(found, Record)
    tensors, metadata = decode_safetensors(bytearray(found.data))
    del metadata["operation"], metadata["kept_at"]
    older = Record(found.stamp.next(7), b"".join(encode_safetensors(tensors, metadata)))
    await store.commit("a", found.stamp, older, [])
    fresh = Layers(store, KEEP_ALL)
    assert [entry.operation for entry in (await fresh.history.list("a", 10, None)).history] == ["unknown"]
    await fresh.update("a", LayerUpdate(eps=0.5), None)
    assert [entry.operation for entry in (await fresh.history.list("a", 10, None)).history] == ["update", "unknown"]
    np.testing.assert_array_equal((await fresh.get("a")).tensors["running_var"].numpy(), np.ones(3, np.float32))

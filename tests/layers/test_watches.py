"""Waits that miss no commit: between a read and its registration, and by others who share the store."""

import asyncio

import pytest

from batchnorm_service.layers import Selection
from batchnorm_service.store.memory import MemoryStore

from .conftest import CONFIG, batch, serving, settle, train

pytestmark = pytest.mark.anyio

BOTH = Selection(("a", "b"))


class _Held(MemoryStore):
    """A load of `held` returns what it has read only when `go_on` is set."""

    held = ""

    def __init__(self):
        super().__init__()
        self.reading, self.go_on = asyncio.Event(), asyncio.Event()

    async def load(self, name, unless=None):
        found = await super().load(name, unless)
        if name == self.held:
            self.reading.set()
            await self.go_on.wait()
        return found


async def test_a_commit_between_the_read_and_the_registration():
    async with serving(_Held(), resident_layers=1) as layers:
        for name in ("a", "b"):
            await layers.create(name, CONFIG)
        await train(layers, "a", batch(0))  # now b is not in the cache, and a is
        known = frozenset((await layers.states.read(BOTH)).tags)
        layers._store.held = "b"
        layers._cache._entries.pop("b", None)
        wait = asyncio.create_task(layers.states.unless(BOTH, known, 60))
        await layers._store.reading.wait()
        await train(layers, "a", batch(1))
        layers._store.go_on.set()
        found = await asyncio.wait_for(wait, 30)
        assert not found.known
        assert found.states.layers["a"].state.num_batches_tracked == 2


async def test_a_commit_of_another_process_ends_the_wait_after_one_check():
    store = MemoryStore()
    store.exclusive = False
    async with serving(store) as mine, serving(store) as others:
        await mine.create("a", CONFIG)
        known = frozenset((await mine.states.read(Selection(("a",)))).tags)
        waits = [asyncio.create_task(mine.states.unless(Selection(("a",)), known, 60)) for _ in range(50)]
        await settle()
        assert mine.states.watches.waiting == 50
        await train(others, "a", batch(0))
        loads = []
        load = store.load

        async def counted(*arguments):
            loads.append(arguments)
            return await load(*arguments)

        store.load = counted
        found = await asyncio.wait_for(asyncio.gather(*waits), 30)
        assert {each.states.layers["a"].state.num_batches_tracked for each in found} == {1}
        assert len(loads) < 10
        if (checks := mine.states.watches._checks) is not None:  # ends with the last wait
            await asyncio.wait_for(checks, 30)

"""The thread pool that layers use in turn."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from batchnorm_service.layers.fair_pool import CALLED_LAYER, FairPool
from batchnorm_service.runtime import RUNTIME

pytestmark = pytest.mark.anyio


@pytest.fixture
def pool():
    pool = FairPool(ThreadPoolExecutor(1), 1, RUNTIME)
    yield pool
    pool.shutdown()


class Thread:
    """Work in the pool, which waits until `go_on` is set, and notes the order."""

    def __init__(self, pool):
        self.pool = pool
        self.go_on = threading.Event()
        self.order = []

    def submit(self, layer):
        async def call():
            CALLED_LAYER.set(layer)
            await self.pool.run(self._work, layer)

        return asyncio.ensure_future(call())

    def _work(self, layer):
        self.go_on.wait()
        self.order.append(layer)


async def test_layers_take_turns(pool):
    thread = Thread(pool)
    tasks = [thread.submit(layer) for layer in "aaaaaabbc"]
    await asyncio.sleep(0)
    thread.go_on.set()
    await asyncio.gather(*tasks)
    # Two of a were handed over before anybody waited.
    assert "".join(thread.order) == "aa" + "abc" + "ab" + "aa"


async def test_who_gives_up_takes_nobody_s_turn(pool):
    thread = Thread(pool)
    tasks = [thread.submit("a") for _ in range(5)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.sleep(0)
    tasks[3].cancel()
    thread.go_on.set()
    await asyncio.wait(tasks)
    assert len(thread.order) == 3
    await asyncio.gather(*[thread.submit("b") for _ in range(4)])
    assert (len(thread.order), pool._free, pool._waiting) == (7, 2, {})


async def test_a_turn_that_came_too_late_goes_to_the_next(pool):
    turns = [asyncio.ensure_future(pool._acquire("a")) for _ in range(4)]
    await asyncio.sleep(0)
    pool._release()
    turns[2].cancel()  # it has its turn, but did not notice it yet
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [turn.done() and not turn.cancelled() for turn in turns] == [True, True, False, True]


async def test_a_failure_frees_the_thread(pool):
    def fail():
        raise LookupError

    for _ in range(3):
        with pytest.raises(LookupError):
            await pool.run(fail)
    assert pool._free == 2

"""Shares of the layers in the running calls and in the event loop."""

import asyncio
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_service.rest.shares import REFUSAL_COST, CallShares, call_cost
from batchnorm_service.store.memory import MemoryStore
from fast_path.running import answer, post, put, serving, until

pytestmark = pytest.mark.anyio

BATCH = save({"input": np.arange(6, dtype=np.float32).reshape(3, 2)})
WAYS = {"fast path": "", "asgi": "Connection: TE\r\n"}


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}


def fill(shares, layers):
    """How many calls each layer gets when all of them ask again and again."""
    taken = Counter()
    asking = list(layers)
    while asking:
        for layer in list(asking):
            if shares.enter(layer) is None:
                taken[layer] += 1
            else:
                asking.remove(layer)
    return taken


@pytest.mark.parametrize("slots", [16, 64, 512])
@pytest.mark.parametrize("flooded", [1, 2, 5])
def test_floods_leave_slots_for_other_layers(slots, flooded):
    shares = CallShares(slots)
    taken = fill(shares, range(flooded))
    assert sum(taken.values()) == shares.running < slots
    assert sum(taken.values()) >= slots * 3 // 4
    assert max(taken.values()) - min(taken.values()) <= 1
    assert shares.enter("other") is None


def test_all_slots_are_used_when_many_layers_ask():
    shares = CallShares(64)
    assert fill(shares, range(64)).total() == 64
    assert shares.enter("other").status == 503


@pytest.mark.parametrize("slots", [1, 2, 15])
def test_few_slots_are_for_anybody(slots):
    shares = CallShares(slots)
    assert fill(shares, ["a"]) == {"a": slots}


def test_slots_come_back():
    shares = CallShares(32)
    for _ in range(3):
        taken = fill(shares, ["a", "b"])
        for layer in taken.elements():
            shares.leave(layer)
        assert shares.running == 0
    assert shares._by_layer == {}


def test_a_refusal_says_which_limit_was_reached():
    shares = CallShares(32)
    fill(shares, ["a"])
    assert "of 32 calls on layer 'a'" in shares.enter("a").detail
    fill(shares, range(64))
    assert shares.enter("a").detail.startswith("32 calls are running")


async def started(shares, order, layer, cost):
    if not shares.may_start(layer, cost):
        await shares.turn(layer, cost)
    order.append(layer)


async def idle(shares):
    await until(lambda: not (shares._waiting or shares._spent or shares._turn_ends))


@pytest.mark.parametrize("cost", [call_cost(0), call_cost(1 << 20), REFUSAL_COST])
async def test_a_layer_does_not_wait_for_the_calls_on_another(cost):
    shares, order = CallShares(512), []
    async with asyncio.TaskGroup() as group:
        for number in range(400):
            group.create_task(started(shares, order, "a", cost))
            if number == 350:
                group.create_task(started(shares, order, "b", cost))
    assert len(order) == 401
    assert order.index("b") <= 1 + (1 << 20) // cost, "what one layer may have in a turn, and no more"
    await idle(shares)


async def test_calls_on_one_layer_keep_their_order():
    shares, order = CallShares(512), []

    async def call(number):
        await started(shares, [], "a", call_cost(0))
        order.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(call(number))
    assert order == list(range(200))


async def test_who_gives_up_is_passed_over():
    shares, order = CallShares(512), []
    tasks = [asyncio.ensure_future(started(shares, order, "a", 1 << 20)) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    await asyncio.wait(tasks)
    assert order == ["a", "a"]
    await idle(shares)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_trains_that_wait_for_their_commits_leave_room_for_other_layers(anyio_backend, monkeypatch, way):
    """1,000 callers that trained one layer had half of all evals of another refused."""
    may_go_on, commit = asyncio.Event(), MemoryStore.commit

    async def wait(*arguments):
        await may_go_on.wait()
        return await commit(*arguments)

    async with serving(monkeypatch, max_concurrent_requests=18) as service:
        await service.ask(post("/v1/layers/bn/eval", BATCH, SAFETENSORS))
        monkeypatch.setattr(MemoryStore, "commit", wait)
        callers = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(40)]
        for _, writer in callers:
            writer.write(post("/v1/layers/bn/train", BATCH, SAFETENSORS, way))
        await until(lambda: service.gateway.running == 16)
        ((status, *_),) = await service.ask(post("/v1/layers/bm/eval", BATCH, SAFETENSORS, way))
        assert status == 200
        may_go_on.set()
        answers = [await answer(reader) for reader, _ in callers]
        for _, writer in callers:
            writer.close()
    statuses = Counter(status for status, *_ in answers)
    assert statuses[200] + statuses[503] == 40
    assert statuses[200] >= 16
    assert all(headers["retry-after"] == "1" for status, headers, _ in answers if status == 503)


async def test_members_that_wait_for_groups_leave_room_for_other_calls(anyio_backend, monkeypatch):
    """Seen: one caller took all slots for ten minutes, with groups of several layers that nobody completes."""
    async with serving(monkeypatch, max_concurrent_requests=18) as service:
        for number in range(6):
            assert (await service.ask(put(f"g{number}", "")))[0][0] == 201
        members = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(17)]
        for number, (_, writer) in enumerate(members):
            await until(lambda number=number: service.gateway.running == number)
            path = f"/v1/layers/g{number % 6}/train?group={number}&size=2&timeout=60"
            writer.write(post(path, BATCH, SAFETENSORS))
        status, headers, body = await answer(members[-1][0])
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"BATCHNORM_MAX_CONCURRENT_REQUESTS" in body
        for path in ("/v1/layers/bm/eval", "/v1/layers/g0/train"):
            assert (await service.ask(post(path, BATCH, SAFETENSORS)))[0][0] == 200
        assert service.gateway.running == 16
        for _, writer in members:
            writer.transport.abort()
        await until(lambda: service.gateway.running == 0)

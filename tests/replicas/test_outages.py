"""A store that is away for a while: calls wait a little, then are told; nothing is lost, and no restart is needed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_service.store.valkey.store import ValkeyStore
from store.valkey_servers import Server
from store.valkey_servers import server as valkey_server

from .conftest import running

pytestmark = pytest.mark.anyio

LAYER = "/v1/layers/shared"
Outage = tuple[Callable[[Server], None], Callable[[Server], None]]
OUTAGES: dict[str, Outage] = {
    "stopped": (lambda server: server.signal(signal.SIGSTOP), lambda server: server.signal(signal.SIGCONT)),
    "killed": (lambda server: server.kill(), lambda server: server.start()),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with valkey_server(tmp_path / "valkey") as one:
        yield one


@pytest.fixture(params=OUTAGES)
def outage(request: pytest.FixtureRequest) -> Outage:
    return OUTAGES[request.param]


@pytest.fixture
async def replicas(anyio_backend: str, server: Server) -> AsyncIterator[list[httpx.AsyncClient]]:
    stores = [ValkeyStore(server.url, timeout=0.2) for _ in range(2)]
    async with running(list(stores), store_timeout_seconds=0.5) as clients:
        (await clients[0].put(LAYER, json={"num_features": 2})).raise_for_status()
        yield clients


def _batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed, 2, size=(6, 2)).astype(np.float32)


async def _train(replica: httpx.AsyncClient, seed: int) -> httpx.Response:
    headers = {"Idempotency-Key": f"batch-{seed}"}
    return await replica.post(f"{LAYER}/train", json={"input": _batch(seed).tolist()}, headers=headers)


async def _ready(replica: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while (await replica.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - it has no other way to tell
            await asyncio.sleep(0.05)


async def _order(replica: httpx.AsyncClient, seeds: range) -> None:
    """Every batch is folded once, in the order that repeats of them tell."""
    told = {}
    for seed in seeds:
        answer = (await _train(replica, seed)).raise_for_status()
        told[answer.json()["num_batches_tracked"]] = seed
    assert sorted(told) == list(range(1, len(seeds) + 1))
    module = nn.BatchNorm1d(2)
    for number in sorted(told):
        module(torch.from_numpy(_batch(told[number])))
    layer = (await replica.get(LAYER)).raise_for_status().json()
    assert layer["num_batches_tracked"] == len(seeds)
    assert np.array_equal(np.array(layer["running_mean"], np.float32), module.running_mean.numpy())


async def test_calls_are_refused_while_it_is_away_and_served_when_it_is_back(
    replicas: list[httpx.AsyncClient], server: Server, outage: Outage
) -> None:
    go, come_back = outage
    for seed in range(4):
        (await _train(replicas[seed % 2], seed)).raise_for_status()
    for round_ in range(2):
        go(server)
        calls = [_train(replicas[n % 2], 4 + 4 * round_ + n) for n in range(4)]
        calls += [replica.post(f"{LAYER}/eval", json={"input": [[1, 2]]}) for replica in replicas]
        calls += [replicas[0].get("/readyz"), replicas[1].put("/v1/layers/other", json={"num_features": 1})]
        for answer in await asyncio.gather(*calls):
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/store-unavailable")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await replicas[0].get("/healthz")).status_code == 200
        come_back(server)
        for replica in replicas:
            await _ready(replica)
        # Some of those that were refused may have been folded: that is told to whoever asks again with the key.
        await _order(replicas[round_], range(8 + 4 * round_))


async def test_a_call_waits_for_a_store_that_is_away_for_a_moment(
    server: Server, outage: Outage, anyio_backend: str
) -> None:
    go, come_back = outage
    async with running([ValkeyStore(server.url, timeout=0.2)], store_timeout_seconds=100) as (replica,):
        (await replica.put(LAYER, json={"num_features": 2})).raise_for_status()
        (await _train(replica, 0)).raise_for_status()
        go(server)
        calls = [asyncio.create_task(_train(replica, seed)) for seed in range(1, 5)]
        done, _ = await asyncio.wait(calls, timeout=0.6)  # longer than a round trip may take
        assert not done, "nothing is acknowledged that is not stored"
        come_back(server)
        answers = await asyncio.gather(*calls)
        assert sorted(answer.raise_for_status().json()["num_batches_tracked"] for answer in answers) == [2, 3, 4, 5]
        await _order(replica, range(5))


async def test_a_wait_outlasts_an_outage(
    replicas: list[httpx.AsyncClient], server: Server, outage: Outage, tmp_path: Path
) -> None:
    go, come_back = outage
    mine, other = replicas
    (await _train(other, 0)).raise_for_status()
    tag = (await mine.get(f"{LAYER}/state")).headers["etag"]
    headers = {"If-None-Match": tag}
    call = asyncio.create_task(mine.get(f"{LAYER}/state?wait=60", headers=headers, timeout=90))
    await _waiting(mine)
    go(server)
    refused = await mine.get(f"{LAYER}/state?wait=0.5", headers=headers)  # the checks fail by now
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/store-unavailable")
    assert not call.done()
    come_back(server)
    await _ready(other)
    (await _train(other, 1)).raise_for_status()
    answer = await asyncio.wait_for(call, 50)
    assert (answer.status_code, answer.headers["etag"] != tag) == (200, True)


async def _waiting(replica: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while "batchnorm_waiting_calls 1.0" not in (await replica.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

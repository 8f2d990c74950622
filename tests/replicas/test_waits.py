"""A call that waits at one service ends when another commits, whatever store they share."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from safetensors.numpy import load

pytestmark = pytest.mark.anyio

ONE, MANY, PREFIX = "/v1/layers/a/state", "/v1/state?names=a,b", "/v1/state?prefix=a"
SAFE = 40.0
"""Seconds after which a test fails; a wait that nothing ended would take 60."""


async def _start(replica: httpx.AsyncClient, url: str) -> asyncio.Task[httpx.Response]:
    """A call at this service, once it waits."""
    tag = (await replica.get(url)).raise_for_status().headers["etag"]
    waiting = f"{url}{'&' if '?' in url else '?'}wait=60"
    call = asyncio.create_task(replica.get(waiting, headers={"If-None-Match": tag}, timeout=90))
    async with asyncio.timeout(SAFE):
        while "batchnorm_waiting_calls 1.0" not in (await replica.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return call


async def _train(replica: httpx.AsyncClient, name: str = "a") -> None:
    (await replica.post(f"/v1/layers/{name}/train", json={"input": [[1, 2], [3, 6]]})).raise_for_status()


@pytest.fixture
async def layers(replicas: list[httpx.AsyncClient]) -> None:
    for name in ("a", "b"):
        (await replicas[0].put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()


@pytest.mark.parametrize("url", [ONE, MANY, PREFIX])
async def test_a_commit_at_another_service_ends_the_wait(
    replicas: list[httpx.AsyncClient], layers: None, url: str
) -> None:
    mine, other, _ = replicas
    for count in (1, 2):
        call = await _start(mine, url)
        await _train(other)
        answer = await asyncio.wait_for(call, SAFE)
        assert answer.status_code == 200
        found = load(answer.content)
        (batches,) = [found[name] for name in found if name in {"num_batches_tracked", "a.num_batches_tracked"}]
        assert batches == count
        assert answer.headers["etag"] == (await other.get(url)).headers["etag"]


async def test_a_layer_that_goes_and_one_that_comes_at_another_service(
    replicas: list[httpx.AsyncClient], layers: None
) -> None:
    mine, other, third = replicas
    call = await _start(mine, PREFIX)
    (await other.put("/v1/layers/a2", json={"num_features": 1})).raise_for_status()
    assert "a2.weight" in load((await asyncio.wait_for(call, SAFE)).content)
    call = await _start(mine, ONE)
    (await third.delete("/v1/layers/a")).raise_for_status()
    assert (await asyncio.wait_for(call, SAFE)).status_code == 404


async def test_another_layer_does_not_end_the_wait(replicas: list[httpx.AsyncClient], layers: None) -> None:
    mine, other, _ = replicas
    call = await _start(mine, ONE)
    await _train(other, "b")
    await _train(other)  # ends it; had b done so, the state would be the one that is known
    answer = await asyncio.wait_for(call, SAFE)
    assert load(answer.content)["num_batches_tracked"] == 1
